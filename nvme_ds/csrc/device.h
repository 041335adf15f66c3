// One directory: its waiting requests, cap, counters, and what the result of a kernel operation means for a part.
// Backends take parts from here, run them, and give them back.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "abi.h"
#include "busy_clock.h"
#include "faults.h"
#include "part.h"
#include "request_queue.h"
#include "span_log.h"
#include "token_bucket.h"

namespace nvme_ds {

enum class Outcome { kFinished, kContinue, kRetryLater };

class Device {
public:
    Device(unsigned depth, double bandwidth_bps, Faults& faults, BusyClock& engine_busy)
        : faults(faults), queue_(depth), bucket_(bandwidth_bps), engine_busy_(engine_busy) {}

    static constexpr int64_t kUntilWoken = -1;
    static constexpr int64_t kRetryDelayNs = 1'000'000;

    Faults& faults;

    // Submitting side. push() takes over the parts, or cancels them at once after stop(); true: the backend must be
    // woken.
    bool push(const std::vector<Part*>& parts);
    void stop();  // cancels what waits; what is in flight goes on

    // Backend side.
    std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(mutex_); }
    Part* take(std::unique_lock<std::mutex>& held, int64_t* wait_ns);
    bool drained(std::unique_lock<std::mutex>& held) const;  // stopped, and nothing in flight any more
    bool stopped(std::unique_lock<std::mutex>&) const { return stopped_; }
    Outcome absorb(Part& part, int64_t result);  // what the kernel answered, or an injected error in its place
    void finish(Part& part);
    void count_fixed() { fixed_ops_.fetch_add(1, std::memory_order_relaxed); }

    // Waiting side. Silent: the kernel has had something all the time since limit_ns ago, and has answered nothing.
    bool silent(int64_t limit_ns) const;
    bool stuck(const Part& part, int64_t limit_ns) const;  // not finished, and its device silent

    void read_counters(nds_counters& out) const;
    void reset_counters();
    void watch(size_t capacity);
    int64_t read_spans(nds_span* out, size_t capacity, uint64_t* lost) const;

private:
    void begin_work(int64_t now);
    void end_work_if_idle(int64_t now);
    void log(const Part& part, int64_t now);
    bool silent_locked(int64_t limit_ns) const;
    void count(const Part& part, uint64_t num_bytes);
    void fail(Part& part, int error);

    mutable std::mutex mutex_;
    RequestQueue queue_;
    TokenBucket bucket_;
    bool stopped_ = false;
    bool parked_ = false;  // the backend found nothing to do and sleeps until woken
    BusyClock busy_;
    BusyClock& engine_busy_;
    bool working_ = false;  // something is in flight, or held back by the cap
    int64_t capped_since_ns_ = 0;
    SpanLog spans_;
    uint64_t max_in_flight_ = 0;
    std::atomic<int64_t> answered_ns_{0};  // last answer, or when the first request after a pause was taken
    std::atomic<uint64_t> bytes_[2]{};
    std::atomic<uint64_t> operations_[2]{};
    std::atomic<uint64_t> errors_{0};
    std::atomic<uint64_t> fixed_ops_{0};
};

}  // namespace nvme_ds
