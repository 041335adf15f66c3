// Which waiting request of a device goes next. Policy only: no lock, no clock, no I/O.
#pragma once

#include <array>
#include <cstddef>
#include <deque>

#include "abi.h"
#include "part.h"

namespace nvme_ds {

class RequestQueue {
public:
    explicit RequestQueue(unsigned depth);

    void push(Part* part) { waiting_[part->priority].push_back(part); }
    Part* pop();  // nullptr when nothing is admissible; the part occupies a slot until release()
    void release(const Part& part);
    Part* drain();  // next waiting part whatever the depth, without a slot: for cancelling

    unsigned in_flight() const { return in_flight_; }
    size_t num_waiting() const;

private:
    static constexpr int kFirstLow = 2;  // optimizer, write-back and background traffic
    static constexpr std::array<unsigned, kNumPriorities> kMaxPassedOver{0, 8, 8, 8, 15};

    bool admissible(int priority) const;
    int choose() const;

    std::array<std::deque<Part*>, kNumPriorities> waiting_;
    std::array<unsigned, kNumPriorities> passed_over_{};
    unsigned depth_;
    unsigned low_depth_;
    unsigned in_flight_ = 0;
    unsigned low_in_flight_ = 0;
};

}  // namespace nvme_ds
