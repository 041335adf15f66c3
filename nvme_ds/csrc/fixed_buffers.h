// Memory registered with one ring. The kernel then keeps the pages pinned instead of looking them up for every request.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "ring.h"

#if NDS_HAVE_URING
namespace nvme_ds {

class FixedBuffers {
public:
    explicit FixedBuffers(int ring_fd);

    int add(uint64_t address, uint64_t num_bytes);  // 0 or -errno; any thread
    void remove(uint64_t address);  // any thread; no transfer may be using the region
    int index_of(uint64_t address, uint64_t num_bytes) const;  // -1 when no single registered piece covers the range

private:
    struct Piece {
        uint64_t address;
        uint64_t end;
        uint64_t region;
        unsigned slot;
    };

    int update_slot(unsigned slot, uint64_t address, uint64_t num_bytes);
    int free_slot() const;

    int ring_fd_;
    bool supported_ = false;
    mutable std::mutex mutex_;
    std::vector<Piece> pieces_;  // a handful: a linear search is fastest
};

}  // namespace nvme_ds
#endif
