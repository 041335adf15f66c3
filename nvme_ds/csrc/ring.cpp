#include "ring.h"

#if NDS_HAVE_URING

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

namespace nvme_ds {
namespace {

int enter(int fd, unsigned to_submit, unsigned min_complete, unsigned flags) {
    const long result = ::syscall(__NR_io_uring_enter, fd, to_submit, min_complete, flags, nullptr, 0);
    return result < 0 ? -errno : static_cast<int>(result);
}

void* map_ring(int fd, size_t num_bytes, off_t offset) {
    void* address = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (address == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of an io_uring");
    return address;
}

unsigned* field(void* ring, unsigned offset) { return reinterpret_cast<unsigned*>(static_cast<char*>(ring) + offset); }

}  // namespace

Ring::Ring(unsigned entries) {
    io_uring_params params{};
    const long fd = ::syscall(__NR_io_uring_setup, entries, &params);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
    fd_ = static_cast<int>(fd);
    try {
        map_rings(params);
    } catch (...) {
        unmap_rings();
        throw;
    }
}

Ring::~Ring() { unmap_rings(); }

void Ring::map_rings(const io_uring_params& params) {
    sq_map_bytes_ = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    cq_map_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    sq_map_ = map_ring(fd_, sq_map_bytes_, IORING_OFF_SQ_RING);
    cq_map_ = map_ring(fd_, cq_map_bytes_, IORING_OFF_CQ_RING);
    sqes_ = static_cast<io_uring_sqe*>(map_ring(fd_, sqes_bytes_, IORING_OFF_SQES));
    sq_head_ = field(sq_map_, params.sq_off.head);
    sq_tail_ = field(sq_map_, params.sq_off.tail);
    sq_array_ = field(sq_map_, params.sq_off.array);
    sq_mask_ = *field(sq_map_, params.sq_off.ring_mask);
    sq_entries_ = params.sq_entries;
    cq_head_ = field(cq_map_, params.cq_off.head);
    cq_tail_ = field(cq_map_, params.cq_off.tail);
    cq_mask_ = *field(cq_map_, params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(static_cast<char*>(cq_map_) + params.cq_off.cqes);
}

void Ring::unmap_rings() {
    if (sqes_) ::munmap(sqes_, sqes_bytes_);
    if (cq_map_) ::munmap(cq_map_, cq_map_bytes_);
    if (sq_map_) ::munmap(sq_map_, sq_map_bytes_);
    if (fd_ >= 0) ::close(fd_);
}

io_uring_sqe* Ring::next_sqe() {
    const unsigned tail = *sq_tail_;  // ours alone
    if (tail - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE) >= sq_entries_) return nullptr;
    io_uring_sqe* sqe = &sqes_[tail & sq_mask_];
    std::memset(sqe, 0, sizeof(*sqe));
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    // The kernel reads entries only inside io_uring_enter on this thread, so the entry may still be filled after this.
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++to_submit_;
    return sqe;
}

int Ring::submit() {
    while (to_submit_) {
        const int taken = enter(fd_, to_submit_, 0, 0);
        if (taken == -EINTR) continue;
        if (taken <= 0) return taken < 0 ? taken : -EAGAIN;
        to_submit_ -= static_cast<unsigned>(taken);
    }
    return 0;
}

void Ring::unqueue() {
    __atomic_store_n(sq_tail_, *sq_tail_ - to_submit_, __ATOMIC_RELEASE);
    to_submit_ = 0;
}

bool Ring::next_cqe(uint64_t* user_data, int32_t* result) {
    const unsigned head = *cq_head_;  // ours alone
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    const io_uring_cqe& cqe = cqes_[head & cq_mask_];
    *user_data = cqe.user_data;
    *result = cqe.res;
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
}

int Ring::wait_for_completion() {
    const int result = enter(fd_, 0, 1, IORING_ENTER_GETEVENTS);
    return result < 0 && result != -EINTR ? result : 0;
}

bool Ring::supports(unsigned opcode) const {
    constexpr unsigned kMaxOps = 256;
    const size_t num_bytes = sizeof(io_uring_probe) + kMaxOps * sizeof(io_uring_probe_op);
    std::unique_ptr<char[]> storage(new char[num_bytes]());
    auto* probe = reinterpret_cast<io_uring_probe*>(storage.get());
    if (::syscall(__NR_io_uring_register, fd_, IORING_REGISTER_PROBE, probe, kMaxOps) < 0) return false;
    return opcode <= probe->last_op && (probe->ops[opcode].flags & IO_URING_OP_SUPPORTED);
}

}  // namespace nvme_ds

#endif
