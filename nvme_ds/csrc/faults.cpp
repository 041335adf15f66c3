#include "faults.h"

namespace nvme_ds {

void Faults::configure(const nds_faults& faults) {
    std::lock_guard<std::mutex> lock(mutex_);
    faults_ = faults;
    state_ = faults.seed;
    active_.store(faults.max_delay_us || faults.fail_count || faults.short_transfers);
}

// splitmix64: any seed is good, also 0.
uint64_t Faults::next_random() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

int Faults::error_for(Op op) {
    if (!active()) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    if (!faults_.fail_count || !(faults_.fail_op >> static_cast<int>(op) & 1)) return 0;
    if (faults_.fail_after_n) {
        --faults_.fail_after_n;
        return 0;
    }
    --faults_.fail_count;
    return faults_.fail_errno;
}

uint64_t Faults::limit(uint64_t num_bytes) {
    if (!active()) return num_bytes;
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t pages = num_bytes / kAlignment;
    if (!faults_.short_transfers || pages < 2 || next_random() % 2) return num_bytes;
    return (1 + next_random() % (pages - 1)) * kAlignment;
}

int64_t Faults::delay_ns() {
    if (!active()) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    return faults_.max_delay_us ? static_cast<int64_t>(next_random() % (faults_.max_delay_us + 1)) * 1000 : 0;
}

}  // namespace nvme_ds
