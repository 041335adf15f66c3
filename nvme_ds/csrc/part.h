// One request of a ticket: a contiguous range of one file and of memory.
#pragma once

#include <cstdint>

namespace nvme_ds {

class Device;
class Ticket;

enum class Op : int32_t { kRead = 0, kWrite = 1, kSync = 2 };

struct Part {
    Ticket* ticket;
    Device* device;
    int fd;
    uint32_t file;
    Op op;
    uint8_t priority;
    bool direct;
    bool finished;  // under the device's lock
    uint16_t retries;
    uint64_t file_offset;
    char* address;
    uint64_t num_bytes;
    uint64_t done_bytes;
    uint64_t volume_offset;
    int64_t begin_ns;  // when a device took it

    uint64_t remaining() const { return num_bytes - done_bytes; }
};

}  // namespace nvme_ds
