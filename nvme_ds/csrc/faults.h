// Test hooks: faults that real devices produce rarely, made on demand. One relaxed load when nothing is injected.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "abi.h"
#include "part.h"

namespace nvme_ds {

class Faults {
public:
    void configure(const nds_faults& faults);

    int error_for(Op op);                         // errno the next operation of this kind fails with, or 0
    uint64_t limit(uint64_t num_bytes);           // how much of a transfer the kernel is asked for
    int64_t delay_ns();                           // how long a finished part is held back

private:
    bool active() const { return active_.load(std::memory_order_relaxed); }
    uint64_t next_random();

    std::atomic<bool> active_{false};
    std::mutex mutex_;
    nds_faults faults_{};
    uint64_t state_ = 0;
};

}  // namespace nvme_ds
