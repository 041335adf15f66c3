#include "faults.h"

#include <unistd.h>

#include <cstring>
#include <new>
#include <utility>

namespace nvme_ds {
namespace {

constexpr uint64_t kSectorBytes = 512;  // what a device writes whole or not at all
constexpr int32_t kWrites = 1 << static_cast<int>(Op::kWrite);

void flip_bit(char* memory, uint64_t num_bytes, uint64_t draw) {
    const uint64_t bit = draw % (8 * num_bytes);
    memory[bit / 8] = static_cast<char>(memory[bit / 8] ^ (1 << bit % 8));
}

}  // namespace

void Faults::configure(const nds_faults& faults) {
    std::lock_guard<std::mutex> lock(mutex_);
    faults_ = faults;
    state_ = faults.seed;
    active_.store(faults.max_delay_us || faults.fail_count || faults.short_transfers || faults.flip_count ||
                  faults.torn_count || faults.stall_op || faults.direct_errno);
    generation_.fetch_add(1);
    changed_.notify_all();
}

// splitmix64: any seed is good, also 0.
uint64_t Faults::next_random() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The first after_n operations of a kind pass, the next count do not.
bool Faults::due(uint64_t& after_n, uint64_t& count, int32_t ops, Op op) {
    if (!count || !(ops >> static_cast<int>(op) & 1)) return false;
    if (after_n) return after_n--, false;
    return count--, true;
}

int Faults::error_for(const Part& part) {
    if (!active()) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    if (part.direct && faults_.direct_errno) return faults_.direct_errno;
    return due(faults_.fail_after_n, faults_.fail_count, faults_.fail_op, part.op) ? faults_.fail_errno : 0;
}

uint64_t Faults::limit(uint64_t num_bytes) {
    if (!active()) return num_bytes;
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t pages = num_bytes / kAlignment;
    if (!faults_.short_transfers || pages < 2 || next_random() % 2) return num_bytes;
    return (1 + next_random() % (pages - 1)) * kAlignment;
}

int64_t Faults::delay_ns() {
    if (!active()) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    return faults_.max_delay_us ? static_cast<int64_t>(next_random() % (faults_.max_delay_us + 1)) * 1000 : 0;
}

char* Faults::memory_for(const Part& part, uint64_t num_bytes) {
    char* const memory = part.address + part.done_bytes;
    if (!active()) return memory;
    std::lock_guard<std::mutex> lock(mutex_);
    const bool torn = due(faults_.torn_after_n, faults_.torn_count, kWrites, part.op);
    const bool flips = due(faults_.flip_after_n, faults_.flip_count, faults_.flip_op, part.op);
    if (!torn && !flips) return memory;
    Tampering tampering = part.op == Op::kWrite ? tamper_write(part, num_bytes, torn, flips)
                                                : Tampering{nullptr, true, next_random()};
    char* const copy = tampering.copy.get();
    tampered_[&part] = std::move(tampering);
    num_tampered_.store(tampered_.size());
    return copy ? copy : memory;
}

// A torn write is one of the whole length whose end is what the file holds already: O_DIRECT could not write a prefix
// of any number of sectors.
Faults::Tampering Faults::tamper_write(const Part& part, uint64_t num_bytes, bool torn, bool flips) {
    std::unique_ptr<char, Free> copy(static_cast<char*>(std::aligned_alloc(kAlignment, num_bytes)));
    if (!copy) throw std::bad_alloc();
    uint64_t kept_bytes = num_bytes;
    if (torn) {
        std::memset(copy.get(), 0, num_bytes);  // past the end of a file
        const off_t offset = static_cast<off_t>(part.file_offset + part.done_bytes);
        [[maybe_unused]] const ssize_t got = ::pread(part.fd, copy.get(), num_bytes, offset);
        kept_bytes = next_random() % (num_bytes / kSectorBytes) * kSectorBytes;
    }
    std::memcpy(copy.get(), part.address + part.done_bytes, kept_bytes);
    const uint64_t draw = next_random();
    if (flips && kept_bytes) flip_bit(copy.get(), kept_bytes, draw);
    return {std::move(copy), false, draw};
}

void Faults::settle(const Part& part, int64_t result) {
    if (!num_tampered_.load(std::memory_order_relaxed)) return;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tampered_.find(&part);
    if (found == tampered_.end()) return;
    if (found->second.flips_read && result > 0)
        flip_bit(part.address + part.done_bytes, static_cast<uint64_t>(result), found->second.draw);
    tampered_.erase(found);
    num_tampered_.store(tampered_.size());
}

uint64_t Faults::stall_locked(Op op) {
    uint64_t endless = 1;
    return due(faults_.stall_after_n, endless, faults_.stall_op, op) ? generation_.load() : 0;
}

uint64_t Faults::stall(Op op) {
    if (!active()) return 0;
    std::lock_guard<std::mutex> lock(mutex_);
    return stall_locked(op);
}

void Faults::wait_while_stalled(Op op) {
    if (!active()) return;
    std::unique_lock<std::mutex> lock(mutex_);
    while (const uint64_t stalled = stall_locked(op))
        changed_.wait(lock, [&] { return generation_.load() != stalled; });
}

}  // namespace nvme_ds
