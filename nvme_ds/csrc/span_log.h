// What a device did while it is watched: one entry for each stretch of a transfer, up to a number of entries.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"

namespace nvme_ds {

class SpanLog {
public:
    // Drops what was recorded before; 0 switches off and frees the memory.
    void start(size_t capacity) {
        capacity_ = capacity;
        lost_ = 0;
        std::vector<nds_span>().swap(spans_);
        spans_.reserve(capacity);  // nothing is allocated while requests finish
    }

    bool on() const { return capacity_ > 0; }

    // A request that was under way together with others of its transfer continues their entry.
    void add(const nds_span& span) {
        const size_t first = spans_.size() - std::min(spans_.size(), kLookBack);
        for (size_t i = spans_.size(); i > first; --i) {
            nds_span& known = spans_[i - 1];
            if (known.ticket != span.ticket || span.begin_ns > known.end_ns) continue;
            known.begin_ns = std::min(known.begin_ns, span.begin_ns);
            known.end_ns = std::max(known.end_ns, span.end_ns);
            known.num_bytes += span.num_bytes;
            return;
        }
        if (spans_.size() < capacity_)
            spans_.push_back(span);
        else
            ++lost_;
    }

    const std::vector<nds_span>& spans() const { return spans_; }
    uint64_t lost() const { return lost_; }

private:
    static constexpr size_t kLookBack = 32;  // transfers that a device works on at once are few: they go in order

    size_t capacity_ = 0;
    std::vector<nds_span> spans_;
    uint64_t lost_ = 0;
};

}  // namespace nvme_ds
