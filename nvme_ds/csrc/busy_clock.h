// Time during which at least one request is in flight: the union, not the sum.
#pragma once

#include <cstdint>
#include <mutex>

namespace nvme_ds {

class BusyClock {
public:
    void enter(int64_t now) {
        std::lock_guard<std::mutex> held(mutex_);
        if (users_++ == 0) since_ns_ = now;
    }

    void leave(int64_t now) {
        std::lock_guard<std::mutex> held(mutex_);
        if (--users_ == 0) total_ns_ += now - since_ns_;
    }

    uint64_t total_ns(int64_t now) const {
        std::lock_guard<std::mutex> held(mutex_);
        return static_cast<uint64_t>(total_ns_ + (users_ ? now - since_ns_ : 0));
    }

    void reset(int64_t now) {
        std::lock_guard<std::mutex> held(mutex_);
        total_ns_ = 0;
        since_ns_ = now;
    }

private:
    mutable std::mutex mutex_;
    unsigned users_ = 0;
    int64_t since_ns_ = 0;
    int64_t total_ns_ = 0;
};

}  // namespace nvme_ds
