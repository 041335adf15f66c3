#include "request_queue.h"

#include <algorithm>
#include <cassert>

namespace nvme_ds {

// An eighth of the slots is kept from the low classes: a device whose queue is full of write-back would make an
// urgent read wait for all of it, whatever the order of our own queue.
RequestQueue::RequestQueue(unsigned depth)
    : depth_(depth), low_depth_(depth == 1 ? 1 : depth - std::max(1u, depth / 8)) {}

bool RequestQueue::admissible(int priority) const {
    return in_flight_ < depth_ && (priority < kFirstLow || low_in_flight_ < low_depth_);
}

// Lower classes first, except that a class passed over eight times in a row (the last one: fifteen times) gets one
// request through: an endless stream of urgent reads slows write-back to a ninth, background traffic to a sixteenth,
// and neither to nothing.
int RequestQueue::choose() const {
    for (int priority = kNumPriorities - 1; priority > 0; --priority)
        if (passed_over_[priority] >= kMaxPassedOver[priority] && !waiting_[priority].empty() && admissible(priority))
            return priority;
    for (int priority = 0; priority < kNumPriorities; ++priority)
        if (!waiting_[priority].empty() && admissible(priority)) return priority;
    return -1;
}

Part* RequestQueue::pop() {
    const int chosen = choose();
    if (chosen < 0) return nullptr;
    Part* part = waiting_[chosen].front();
    waiting_[chosen].pop_front();
    passed_over_[chosen] = 0;
    for (int lower = chosen + 1; lower < kNumPriorities; ++lower)
        if (!waiting_[lower].empty()) ++passed_over_[lower];
    ++in_flight_;
    if (chosen >= kFirstLow) ++low_in_flight_;
    return part;
}

void RequestQueue::release(const Part& part) {
    assert(in_flight_ > 0);
    --in_flight_;
    if (part.priority >= kFirstLow) --low_in_flight_;
}

Part* RequestQueue::drain() {
    for (auto& queue : waiting_) {
        if (queue.empty()) continue;
        Part* part = queue.front();
        queue.pop_front();
        return part;
    }
    return nullptr;
}

size_t RequestQueue::num_waiting() const {
    size_t total = 0;
    for (const auto& queue : waiting_) total += queue.size();
    return total;
}

}  // namespace nvme_ds
