#include "device.h"

#include <algorithm>
#include <cerrno>

#include "clock.h"
#include "ticket.h"

namespace nvme_ds {
namespace {

constexpr uint16_t kMaxRetries = 1000;  // a second of EAGAIN at kRetryDelayNs

void cancel(Part& part) {
    part.ticket->record_error(part, ECANCELED);
    part.ticket->part_finished();
}

}  // namespace

bool Device::push(const std::vector<Part*>& parts) {
    {
        std::lock_guard<std::mutex> held(mutex_);
        if (!stopped_) {
            for (Part* part : parts) queue_.push(part);
            const bool wake = parked_;
            parked_ = false;
            return wake;
        }
    }
    for (Part* part : parts) cancel(*part);
    return false;
}

void Device::stop() {
    std::vector<Part*> waiting;
    {
        std::lock_guard<std::mutex> held(mutex_);
        stopped_ = true;
        while (Part* part = queue_.drain()) waiting.push_back(part);
        end_work_if_idle(now_ns());
    }
    for (Part* part : waiting) cancel(*part);
}

Part* Device::take(std::unique_lock<std::mutex>&, int64_t* wait_ns) {
    const int64_t now = now_ns();
    *wait_ns = bucket_.wait_ns(now);
    const bool capped = *wait_ns > 0 && queue_.num_waiting() > 0;
    if (capped && capped_since_ns_ == 0) capped_since_ns_ = now;
    if (capped) begin_work(now);
    Part* part = *wait_ns == 0 ? queue_.pop() : nullptr;
    if (!part) {
        // With nothing waiting the cap does not matter: sleep until there is something.
        if (*wait_ns == 0 || queue_.num_waiting() == 0) *wait_ns = kUntilWoken;
        parked_ = true;
        return nullptr;
    }
    begin_work(now);
    if (queue_.in_flight() == 1) answered_ns_.store(now, std::memory_order_relaxed);
    part->begin_ns = capped_since_ns_ ? capped_since_ns_ : now;
    capped_since_ns_ = 0;
    max_in_flight_ = std::max<uint64_t>(max_in_flight_, queue_.in_flight());
    bucket_.take(part->num_bytes, now);
    return part;
}

// A cap stands for a slower device: what it holds back counts as the device's work.
void Device::begin_work(int64_t now) {
    if (working_) return;
    working_ = true;
    busy_.enter(now);
    engine_busy_.enter(now);
}

void Device::end_work_if_idle(int64_t now) {
    if (!working_ || queue_.in_flight() > 0 || queue_.num_waiting() > 0) return;
    working_ = false;
    busy_.leave(now);
    engine_busy_.leave(now);
}

void Device::log(const Part& part, int64_t now) {
    if (part.op == Op::kSync) return;
    spans_.add({part.begin_ns, now, part.ticket->id, part.ticket->volume_id, part.volume_offset, part.num_bytes,
                static_cast<int32_t>(part.op), part.priority});
}

void Device::watch(size_t capacity) {
    std::lock_guard<std::mutex> held(mutex_);
    spans_.start(capacity);
}

int64_t Device::read_spans(nds_span* out, size_t capacity, uint64_t* lost) const {
    std::lock_guard<std::mutex> held(mutex_);
    *lost = spans_.lost();
    std::copy_n(spans_.spans().begin(), std::min(capacity, spans_.spans().size()), out);
    return static_cast<int64_t>(spans_.spans().size());
}

bool Device::drained(std::unique_lock<std::mutex>&) const { return stopped_ && queue_.in_flight() == 0; }

void Device::count(const Part& part, uint64_t num_bytes) {
    const int kind = part.op == Op::kWrite;
    bytes_[kind].fetch_add(num_bytes, std::memory_order_relaxed);
    operations_[kind].fetch_add(1, std::memory_order_relaxed);
}

void Device::fail(Part& part, int error) {
    errors_.fetch_add(1, std::memory_order_relaxed);
    part.ticket->record_error(part, error);
}

Outcome Device::absorb(Part& part, int64_t result) {
    answered_ns_.store(now_ns(), std::memory_order_relaxed);
    faults.settle(part, result);
    if (part.op == Op::kSync && result >= 0) return Outcome::kFinished;
    if (result > 0) {
        count(part, static_cast<uint64_t>(result));
        uint64_t advanced = static_cast<uint64_t>(result);
        // O_DIRECT cannot go on from an odd place: the tail of a torn block is transferred again.
        if (part.direct && advanced < part.remaining()) advanced -= advanced % kAlignment;
        part.done_bytes += advanced;
        if (part.remaining() == 0) return Outcome::kFinished;
        if (advanced > 0) return Outcome::kContinue;
        result = -EIO;
    }
    if (result == -EINTR) return Outcome::kContinue;
    // Some network and FUSE file systems take the flag and refuse what is done with it, the one at once, the other
    // only where a write is not aligned to their own blocks.
    if (part.direct && (result == -EINVAL || result == -EOPNOTSUPP) &&
        part.ticket->leave_direct(part, static_cast<int>(-result))) {
        part.direct = false;
        return Outcome::kContinue;
    }
    if (result == -EAGAIN && part.retries++ < kMaxRetries) return Outcome::kRetryLater;
    // Nothing transferred and no error: a read past the end of a truncated file, or a write that a device will
    // not take.
    if (result == 0) result = part.op == Op::kRead ? -ENODATA : -EIO;
    fail(part, static_cast<int>(-result));
    return Outcome::kFinished;
}

void Device::finish(Part& part) {
    {
        std::lock_guard<std::mutex> held(mutex_);
        queue_.release(part);
        part.finished = true;
        const int64_t now = now_ns();
        end_work_if_idle(now);
        if (spans_.on()) log(part, now);
    }
    part.ticket->part_finished();
}

bool Device::silent_locked(int64_t limit_ns) const {
    return queue_.in_flight() > 0 && now_ns() - answered_ns_.load(std::memory_order_relaxed) >= limit_ns;
}

bool Device::silent(int64_t limit_ns) const {
    std::lock_guard<std::mutex> held(mutex_);
    return silent_locked(limit_ns);
}

bool Device::stuck(const Part& part, int64_t limit_ns) const {
    std::lock_guard<std::mutex> held(mutex_);
    return !part.finished && silent_locked(limit_ns);
}

void Device::read_counters(nds_counters& out) const {
    out.bytes_read = bytes_[0].load(std::memory_order_relaxed);
    out.bytes_written = bytes_[1].load(std::memory_order_relaxed);
    out.reads = operations_[0].load(std::memory_order_relaxed);
    out.writes = operations_[1].load(std::memory_order_relaxed);
    out.errors = errors_.load(std::memory_order_relaxed);
    out.fixed_ops = fixed_ops_.load(std::memory_order_relaxed);
    out.busy_ns = busy_.total_ns(now_ns());
    std::lock_guard<std::mutex> held(mutex_);
    out.queued = queue_.num_waiting();
    out.in_flight = queue_.in_flight();
    out.max_in_flight = max_in_flight_;
}

void Device::reset_counters() {
    for (auto* counter : {&bytes_[0], &bytes_[1], &operations_[0], &operations_[1], &errors_, &fixed_ops_})
        counter->store(0);
    busy_.reset(now_ns());
    std::lock_guard<std::mutex> held(mutex_);
    max_in_flight_ = queue_.in_flight();
}

}  // namespace nvme_ds
