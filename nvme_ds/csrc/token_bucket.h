// Bandwidth cap. Kept as the time at which everything admitted so far would be over at the capped rate, so that a late
// wake-up is made good by the next request instead of being lost.
#pragma once

#include <algorithm>
#include <cstdint>

namespace nvme_ds {

class TokenBucket {
public:
    explicit TokenBucket(double bytes_per_s) : ns_per_byte_(bytes_per_s > 0 ? 1e9 / bytes_per_s : 0.0) {}

    // 0 when a request may start, otherwise how long to wait.
    int64_t wait_ns(int64_t now) const { return ns_per_byte_ == 0.0 ? 0 : std::max<int64_t>(0, due_ns_ - now); }

    void take(uint64_t num_bytes, int64_t now) {
        if (ns_per_byte_ == 0.0) return;
        due_ns_ =
            std::max(due_ns_, now - kBurstNs) + static_cast<int64_t>(ns_per_byte_ * static_cast<double>(num_bytes));
    }

private:
    static constexpr int64_t kBurstNs = 10'000'000;  // credit an idle device may save up

    double ns_per_byte_;
    int64_t due_ns_ = INT64_MIN / 2;
};

}  // namespace nvme_ds
