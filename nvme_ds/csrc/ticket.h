// A transfer as the caller sees it: done when all of its parts are, failed with the first error among them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "part.h"
#include "volume.h"

namespace nvme_ds {

class Ticket {
public:
    Ticket(std::shared_ptr<Volume> volume, int64_t volume_id) : volume_id(volume_id), volume_(std::move(volume)) {}

    const int64_t volume_id;
    int64_t id = 0;  // set before the parts are handed to devices
    std::vector<Part> parts;  // filled before start(), then only touched by whoever holds a part

    void start(std::shared_ptr<Ticket> self);
    void record_error(const Part& part, int error);
    bool leave_direct(const Part& part, int error);  // whether the part may be tried without O_DIRECT
    void part_finished();

    bool done() const;
    bool wait_until(int64_t deadline_ns);
    std::string path_of(const Part& part) const;  // empty once the ticket is done
    int failure(nds_failure& out) const;  // 0, -errno or kFellBack; call when done

private:
    struct Failure {
        int error = 0;
        Op op = Op::kRead;
        uint64_t offset = 0;
        uint64_t num_bytes = 0;
        std::string path;
    };

    std::atomic<size_t> remaining_{0};
    mutable std::mutex mutex_;
    std::condition_variable finished_;
    bool done_ = false;
    Failure failure_;
    Failure fallback_;
    std::shared_ptr<Volume> volume_;
    std::shared_ptr<Ticket> self_;  // keeps the parts alive while a device holds pointers to them
};

class TicketTable {
public:
    int64_t insert(std::shared_ptr<Ticket> ticket);
    std::shared_ptr<Ticket> find(int64_t id) const;
    void forget(int64_t id);
    size_t size() const;

private:
    mutable std::mutex mutex_;
    int64_t next_id_ = 1;
    std::unordered_map<int64_t, std::shared_ptr<Ticket>> tickets_;
};

}  // namespace nvme_ds
