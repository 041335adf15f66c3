// One ring and one thread per device. The thread sleeps in ppoll on the ring and on an eventfd, so that submitters
// never touch the ring and the cap's timer needs no operation of its own.
#include <cerrno>

#include "backend.h"
#include "ring.h"

#if !NDS_HAVE_URING

#include <system_error>

namespace nvme_ds {

std::unique_ptr<Backend> make_uring_backend(Device&, unsigned) {
    throw std::system_error(ENOSYS, std::generic_category(), "built without <linux/io_uring.h>");
}

int probe_uring(unsigned) { return -ENOSYS; }

}  // namespace nvme_ds

#else

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <system_error>
#include <thread>
#include <vector>

#include "clock.h"
#include "device.h"
#include "exit_latch.h"
#include "fixed_buffers.h"
#include "worker_thread.h"

namespace nvme_ds {
namespace {

int make_eventfd() {
    const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    return fd;
}

class UringBackend final : public Backend {
public:
    UringBackend(Device& device, unsigned queue_depth)
        : device_(device), ring_(queue_depth), buffers_(ring_.fd()), latch_(1), wake_fd_(make_eventfd()) {
        try {
            thread_ = start_worker("nvme_ds-ring", [this] { loop(); });
        } catch (...) {
            ::close(wake_fd_);
            throw;
        }
    }

    ~UringBackend() override {
        thread_.join();
        ::close(wake_fd_);
    }

    void wake() override {
        const uint64_t one = 1;
        [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof(one));
    }

    void detach() override {
        if (thread_.joinable()) thread_.detach();
    }

    bool exited_before(int64_t deadline_ns) override { return latch_.wait_until(deadline_ns); }
    int add_buffer(uint64_t address, uint64_t num_bytes) override { return buffers_.add(address, num_bytes); }
    void remove_buffer(uint64_t address) override { buffers_.remove(address); }

private:
    // A part that waits for a time: to be reported (injected delay) or to be tried again (EAGAIN).
    struct Held {
        int64_t due_ns;
        Part* part;
        bool finished;
    };

    struct Stalled {
        uint64_t generation;  // of the faults that stalled it
        Part* part;
    };

    void loop() {
        for (;;) {
            reap();
            release_held();
            release_stalled();
            const int64_t cap_wait_ns = fill();
            const bool congested = submit();
            if (all_done()) break;
            park(cap_wait_ns, congested);
        }
        latch_.exited();
    }

    bool all_done() {
        auto held = device_.lock();
        return device_.drained(held);
    }

    int64_t fill() {
        for (;;) {
            int64_t wait_ns = 0;
            Part* part = nullptr;
            {
                auto held = device_.lock();
                part = device_.take(held, &wait_ns);
            }
            if (!part) return wait_ns;
            start(*part);
        }
    }

    void start(Part& part) {
        if (const uint64_t generation = device_.faults.stall(part.op))
            stalled_.push_back({generation, &part});
        else if (const int error = device_.faults.error_for(part))
            handle(part, -error);
        else
            prepare(part);
    }

    void prepare(Part& part) {
        // Never full: the ring has at least as many entries as the device has slots.
        io_uring_sqe* sqe = ring_.next_sqe();
        if (part.op == Op::kSync) {
            sqe->opcode = IORING_OP_FSYNC;
            sqe->fsync_flags = IORING_FSYNC_DATASYNC;
        } else {
            prepare_transfer(part, *sqe);
        }
        sqe->fd = part.fd;
        sqe->user_data = reinterpret_cast<uint64_t>(&part);
        queued_.push_back(&part);
    }

    void prepare_transfer(const Part& part, io_uring_sqe& sqe) {
        const uint64_t num_bytes = device_.faults.limit(part.remaining());
        const uint64_t address = reinterpret_cast<uint64_t>(device_.faults.memory_for(part, num_bytes));
        const int slot = buffers_.index_of(address, num_bytes);
        const bool write = part.op == Op::kWrite;
        sqe.opcode = slot >= 0 ? (write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED)
                               : (write ? IORING_OP_WRITE : IORING_OP_READ);
        if (slot >= 0) {
            sqe.buf_index = static_cast<uint16_t>(slot);
            device_.count_fixed();
        }
        sqe.addr = address;
        sqe.len = static_cast<uint32_t>(num_bytes);
        sqe.off = part.file_offset + part.done_bytes;
    }

    // True when the kernel is short of resources and the rest must be offered again.
    bool submit() {
        const int error = ring_.submit();
        while (queued_.size() > ring_.unsubmitted()) queued_.pop_front();
        if (error == -EAGAIN || error == -EBUSY) return true;
        if (error) {
            ring_.unqueue();
            std::deque<Part*> refused;
            refused.swap(queued_);
            for (Part* part : refused) handle(*part, error);
        }
        return false;
    }

    void reap() {
        uint64_t user_data = 0;
        int32_t result = 0;
        while (ring_.next_cqe(&user_data, &result)) handle(*reinterpret_cast<Part*>(user_data), result);
    }

    void handle(Part& part, int64_t result) {
        switch (device_.absorb(part, result)) {
            case Outcome::kContinue:
                start(part);
                break;
            case Outcome::kRetryLater:
                held_.push_back({now_ns() + Device::kRetryDelayNs, &part, false});
                break;
            case Outcome::kFinished:
                if (const int64_t delay_ns = device_.faults.delay_ns())
                    held_.push_back({now_ns() + delay_ns, &part, true});
                else
                    device_.finish(part);
        }
    }

    void release_held() {
        if (held_.empty()) return;
        const int64_t now = now_ns();
        std::vector<Held> due;
        const auto keep =
            std::stable_partition(held_.begin(), held_.end(), [now](const Held& h) { return h.due_ns > now; });
        due.assign(keep, held_.end());
        held_.erase(keep, held_.end());
        std::sort(due.begin(), due.end(), [](const Held& a, const Held& b) { return a.due_ns < b.due_ns; });
        for (const Held& held : due) {
            if (held.finished)
                device_.finish(*held.part);
            else
                start(*held.part);
        }
    }

    void release_stalled() {
        if (stalled_.empty() || stalled_.front().generation == device_.faults.generation()) return;
        std::vector<Stalled> released;
        released.swap(stalled_);
        for (const Stalled& stalled : released) start(*stalled.part);
    }

    void park(int64_t cap_wait_ns, bool congested) {
        int64_t wait_ns = congested ? Device::kRetryDelayNs : cap_wait_ns;
        for (const Held& held : held_) {
            const int64_t left = std::max<int64_t>(0, held.due_ns - now_ns());
            wait_ns = wait_ns < 0 ? left : std::min(wait_ns, left);
        }
        const timespec timeout{static_cast<time_t>(wait_ns / 1'000'000'000),
                               static_cast<long>(wait_ns % 1'000'000'000)};
        pollfd sources[2] = {{ring_.fd(), POLLIN, 0}, {wake_fd_, POLLIN, 0}};
        ::ppoll(sources, 2, wait_ns < 0 ? nullptr : &timeout, nullptr);
        if (sources[1].revents & POLLIN) {
            uint64_t count = 0;
            [[maybe_unused]] const ssize_t got = ::read(wake_fd_, &count, sizeof(count));
        }
    }

    Device& device_;
    Ring ring_;
    FixedBuffers buffers_;
    ExitLatch latch_;
    int wake_fd_;
    std::deque<Part*> queued_;  // in the submission ring, not yet taken by the kernel
    std::vector<Held> held_;
    std::vector<Stalled> stalled_;
    std::thread thread_;
};

}  // namespace

std::unique_ptr<Backend> make_uring_backend(Device& device, unsigned queue_depth) {
    return std::make_unique<UringBackend>(device, queue_depth);
}

int probe_uring(unsigned queue_depth) {
    try {
        Ring ring(queue_depth);
        for (unsigned opcode : {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC})
            if (!ring.supports(opcode)) return -EOPNOTSUPP;
        return 0;
    } catch (const std::system_error& error) {
        return -error.code().value();
    }
}

}  // namespace nvme_ds

#endif
