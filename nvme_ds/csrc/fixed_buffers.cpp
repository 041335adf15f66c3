#include "fixed_buffers.h"

#if NDS_HAVE_URING

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace nvme_ds {
namespace {

constexpr unsigned kNumSlots = 1024;
constexpr uint64_t kMaxPieceBytes = 1ull << 30;  // the kernel's limit for one registered buffer

}  // namespace

#ifdef IORING_RSRC_REGISTER_SPARSE  // Linux 5.19: an empty table whose slots are filled one by one

FixedBuffers::FixedBuffers(int ring_fd) : ring_fd_(ring_fd) {
    io_uring_rsrc_register table{};
    table.nr = kNumSlots;
    table.flags = IORING_RSRC_REGISTER_SPARSE;
    supported_ = ::syscall(__NR_io_uring_register, ring_fd_, IORING_REGISTER_BUFFERS2, &table, sizeof(table)) == 0;
}

int FixedBuffers::update_slot(unsigned slot, uint64_t address, uint64_t num_bytes) {
    iovec memory{reinterpret_cast<void*>(address), num_bytes};
    io_uring_rsrc_update2 update{};
    update.offset = slot;
    update.data = reinterpret_cast<uint64_t>(&memory);
    update.nr = 1;
    const long result =
        ::syscall(__NR_io_uring_register, ring_fd_, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
    return result < 0 ? -errno : 0;
}

#else

FixedBuffers::FixedBuffers(int ring_fd) : ring_fd_(ring_fd) {}
int FixedBuffers::update_slot(unsigned, uint64_t, uint64_t) { return -ENOTSUP; }

#endif

int FixedBuffers::free_slot() const {
    for (unsigned slot = 0; slot < kNumSlots; ++slot)
        if (std::none_of(pieces_.begin(), pieces_.end(), [slot](const Piece& piece) { return piece.slot == slot; }))
            return slot;
    return -ENOSPC;
}

int FixedBuffers::add(uint64_t address, uint64_t num_bytes) {
    if (!supported_) return -ENOTSUP;
    for (uint64_t begin = address, end = address + num_bytes; begin < end; begin += kMaxPieceBytes) {
        const uint64_t piece_bytes = std::min(kMaxPieceBytes, end - begin);
        std::unique_lock<std::mutex> held(mutex_);
        const int slot = free_slot();
        const int error = slot < 0 ? slot : update_slot(static_cast<unsigned>(slot), begin, piece_bytes);
        if (error) {
            held.unlock();
            remove(address);  // all or nothing: half a region would hide that the limit was hit
            return error;
        }
        pieces_.push_back({begin, begin + piece_bytes, address, static_cast<unsigned>(slot)});
    }
    return 0;
}

void FixedBuffers::remove(uint64_t address) {
    std::lock_guard<std::mutex> held(mutex_);
    for (size_t i = pieces_.size(); i-- > 0;) {
        if (pieces_[i].region != address) continue;
        update_slot(pieces_[i].slot, 0, 0);
        pieces_.erase(pieces_.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

int FixedBuffers::index_of(uint64_t address, uint64_t num_bytes) const {
    std::lock_guard<std::mutex> held(mutex_);
    for (const Piece& piece : pieces_)
        if (address >= piece.address && address + num_bytes <= piece.end) return static_cast<int>(piece.slot);
    return -1;
}

}  // namespace nvme_ds

#endif
