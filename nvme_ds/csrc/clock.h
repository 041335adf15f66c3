#pragma once

#include <chrono>
#include <cstdint>

namespace nvme_ds {

inline int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline std::chrono::steady_clock::time_point time_point_of(int64_t at_ns) {
    return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(at_ns));
}

}  // namespace nvme_ds
