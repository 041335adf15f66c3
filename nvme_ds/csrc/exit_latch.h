// Lets close() wait for threads with a deadline, which join() cannot.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "clock.h"

namespace nvme_ds {

class ExitLatch {
public:
    explicit ExitLatch(unsigned num_threads) : running_(num_threads) {}

    void exited() {
        std::lock_guard<std::mutex> held(mutex_);
        --running_;
        changed_.notify_all();
    }

    bool wait_until(int64_t deadline_ns) {
        std::unique_lock<std::mutex> held(mutex_);
        return changed_.wait_until(held, time_point_of(deadline_ns), [this] { return running_ == 0; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    unsigned running_;
};

}  // namespace nvme_ds
