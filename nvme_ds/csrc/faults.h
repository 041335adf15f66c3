// Test hooks: faults that real devices produce rarely, made on demand. One relaxed load when nothing is injected.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "abi.h"
#include "part.h"

namespace nvme_ds {

class Faults {
public:
    void configure(const nds_faults& faults);

    int error_for(const Part& part);     // errno the next operation of its kind fails with, or 0
    uint64_t limit(uint64_t num_bytes);  // how much of a transfer the kernel is asked for
    int64_t delay_ns();                  // how long a finished part is held back

    // The memory a transfer of num_bytes goes through: the caller's, or for a tampered write a copy that lives until
    // settle(), which every answer of the kernel goes to.
    char* memory_for(const Part& part, uint64_t num_bytes);
    void settle(const Part& part, int64_t result);

    // 0, or the number of the settings under which the next operation of this kind gets no answer. It goes on once
    // generation() is another one: poll for that, or sleep in wait_while_stalled().
    uint64_t stall(Op op);
    uint64_t generation() const { return generation_.load(); }
    void wait_while_stalled(Op op);

private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    struct Tampering {
        std::unique_ptr<char, Free> copy;  // of a write
        bool flips_read;
        uint64_t draw;
    };

    bool active() const { return active_.load(std::memory_order_relaxed); }
    uint64_t next_random();
    bool due(uint64_t& after_n, uint64_t& count, int32_t ops, Op op);
    uint64_t stall_locked(Op op);
    Tampering tamper_write(const Part& part, uint64_t num_bytes, bool torn, bool flips);

    std::atomic<bool> active_{false};
    std::mutex mutex_;
    std::condition_variable changed_;
    nds_faults faults_{};
    uint64_t state_ = 0;
    std::atomic<uint64_t> generation_{1};
    std::unordered_map<const Part*, Tampering> tampered_;
    std::atomic<size_t> num_tampered_{0};
};

}  // namespace nvme_ds
