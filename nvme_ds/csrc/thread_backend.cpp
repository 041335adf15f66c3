// pread/pwrite from a few threads per device: works wherever files do.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <thread>
#include <vector>

#include "backend.h"
#include "clock.h"
#include "device.h"
#include "exit_latch.h"
#include "worker_thread.h"

namespace nvme_ds {

int Backend::add_buffer(uint64_t, uint64_t) { return -ENOTSUP; }
void Backend::remove_buffer(uint64_t) {}

namespace {

int64_t transfer(const Part& part, char* address, uint64_t num_bytes) {
    const off_t offset = static_cast<off_t>(part.file_offset + part.done_bytes);
    const ssize_t result = part.op == Op::kRead ? ::pread(part.fd, address, num_bytes, offset)
                                                : ::pwrite(part.fd, address, num_bytes, offset);
    return result < 0 ? -errno : result;
}

class ThreadBackend final : public Backend {
public:
    ThreadBackend(Device& device, unsigned num_threads) : device_(device), latch_(num_threads) {
        threads_.reserve(num_threads);
        try {
            for (unsigned i = 0; i < num_threads; ++i)
                threads_.push_back(start_worker("nvme_ds-pool", [this] { work(); }));
        } catch (...) {
            device_.stop();
            wake();
            join();
            throw;
        }
    }

    ~ThreadBackend() override { join(); }

    void wake() override {
        // An empty critical section: a worker between its last look at the queue and its wait must not miss this.
        device_.lock().unlock();
        work_arrived_.notify_all();
    }

    void detach() override {
        for (std::thread& thread : threads_)
            if (thread.joinable()) thread.detach();
    }

    bool exited_before(int64_t deadline_ns) override { return latch_.wait_until(deadline_ns); }

private:
    void join() {
        for (std::thread& thread : threads_) thread.join();
    }

    Part* next() {
        auto held = device_.lock();
        while (!device_.stopped(held)) {
            int64_t wait_ns = 0;
            if (Part* part = device_.take(held, &wait_ns)) return part;
            if (wait_ns == Device::kUntilWoken)
                work_arrived_.wait(held);
            else
                work_arrived_.wait_until(held, time_point_of(now_ns() + wait_ns));
        }
        return nullptr;
    }

    Outcome step(Part& part) {
        device_.faults.wait_while_stalled(part.op);
        if (const int error = device_.faults.error_for(part)) return device_.absorb(part, -error);
        if (part.op == Op::kSync) return device_.absorb(part, ::fdatasync(part.fd) == 0 ? 0 : -errno);
        const uint64_t num_bytes = device_.faults.limit(part.remaining());
        return device_.absorb(part, transfer(part, device_.faults.memory_for(part, num_bytes), num_bytes));
    }

    void run(Part& part) {
        for (Outcome outcome = step(part); outcome != Outcome::kFinished; outcome = step(part))
            if (outcome == Outcome::kRetryLater)
                std::this_thread::sleep_for(std::chrono::nanoseconds(Device::kRetryDelayNs));
        if (const int64_t delay_ns = device_.faults.delay_ns())
            std::this_thread::sleep_for(std::chrono::nanoseconds(delay_ns));
        device_.finish(part);
    }

    void work() {
        while (Part* part = next()) run(*part);
        latch_.exited();
    }

    Device& device_;
    std::condition_variable work_arrived_;
    ExitLatch latch_;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_thread_backend(Device& device, unsigned num_threads) {
    return std::make_unique<ThreadBackend>(device, num_threads);
}

}  // namespace nvme_ds
