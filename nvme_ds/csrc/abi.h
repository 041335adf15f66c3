// The C surface of the library: plain structures and the export macro. Python mirrors these in native.py; any change
// here raises kAbiVersion, which is checked when the library is loaded.
#pragma once

#include <cstdint>

#define NDS_EXPORT extern "C" __attribute__((visibility("default")))

namespace nvme_ds {
constexpr int32_t kAbiVersion = 4;
constexpr uint64_t kAlignment = 4096;  // covers the logical block of every NVMe format in use
constexpr int kNumPriorities = 5;
constexpr int32_t kFellBack = 1;  // done, and its volume has gone on without O_DIRECT, which `failure` describes
constexpr int32_t kStalled = -100'000;  // no errno: not done, and a device that should answer does not
}  // namespace nvme_ds

// What went wrong first in a ticket (or a sync). Offsets are those of the file named by path.
struct nds_failure {
    int32_t error;
    int32_t op;
    uint64_t offset;
    uint64_t num_bytes;
    char path[4096];
};

struct nds_counters {
    uint64_t bytes_read;
    uint64_t bytes_written;
    uint64_t reads;
    uint64_t writes;
    uint64_t errors;
    uint64_t busy_ns;
    uint64_t fixed_ops;
    uint64_t queued;
    uint64_t in_flight;
    uint64_t max_in_flight;
};

// A stretch of a transfer on one device, from when it could have begun but for the cap to its last answer.
// Times are those of CLOCK_MONOTONIC.
struct nds_span {
    int64_t begin_ns;
    int64_t end_ns;
    int64_t ticket;
    int64_t volume;
    uint64_t offset;  // of the volume; where its first request to be answered begins
    uint64_t num_bytes;
    int32_t op;  // 0 read, 1 write
    int32_t priority;
};

struct nds_faults {
    uint64_t seed;
    uint64_t max_delay_us;
    uint64_t fail_after_n;
    uint64_t fail_count;
    uint64_t flip_after_n;
    uint64_t flip_count;
    uint64_t torn_after_n;
    uint64_t torn_count;
    uint64_t stall_after_n;
    int32_t fail_op;  // bit set: 1 reads, 2 writes, 4 syncs; so are the other two
    int32_t fail_errno;
    int32_t flip_op;
    int32_t stall_op;
    int32_t short_transfers;
    int32_t direct_errno;  // what every transfer with O_DIRECT fails with, or 0; where the structure had padding before
};

struct nds_engine_options {
    int32_t backend;  // nvme_ds::BackendKind
    uint32_t queue_depth;
    uint32_t num_threads;
    uint64_t request_bytes;
    int64_t stall_timeout_ns;
};

struct nds_volume_spec {
    uint32_t num_files;
    const int32_t* devices;
    const int32_t* fds;  // owned by the library once the call has succeeded
    const char* const* paths;
    uint32_t pattern_length;
    const uint32_t* pattern;  // file index of each stripe of one cycle
    uint64_t stripe_bytes;
    uint64_t num_bytes;
    int32_t direct;  // 0: no, 1: yes, as long as the files take it, 2: yes
};
