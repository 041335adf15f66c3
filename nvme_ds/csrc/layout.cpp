#include "layout.h"

#include <algorithm>
#include <utility>

namespace nvme_ds {

Layout::Layout(std::vector<uint32_t> pattern, uint32_t num_files, uint64_t stripe_bytes)
    : pattern_(std::move(pattern)), per_cycle_(num_files, 0), stripe_bytes_(stripe_bytes) {
    for (uint32_t file : pattern_) rank_.push_back(per_cycle_[file]++);
}

Extent Layout::extent_at(uint64_t offset, uint64_t limit) const {
    const uint64_t first = offset / stripe_bytes_;
    const uint64_t slot = first % pattern_.size();
    const uint32_t file = pattern_[slot];
    const uint64_t row = first / pattern_.size() * per_cycle_[file] + rank_[slot];
    const uint64_t within = offset % stripe_bytes_;
    // Neighbouring stripes dealt to the same file are neighbours in that file too, so a request may span them.
    uint64_t num_bytes = stripe_bytes_ - within;
    for (uint64_t next = first + 1; num_bytes < limit && pattern_[next % pattern_.size()] == file; ++next)
        num_bytes += stripe_bytes_;
    return {file, row * stripe_bytes_ + within, std::min(num_bytes, limit)};
}

}  // namespace nvme_ds
