// What the disk gives to the plainest loop that keeps it busy: the yardstick of the benchmark. Shares nothing with the
// engine but the wrapper around the io_uring system calls.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "abi.h"
#include "clock.h"
#include "ring.h"

struct nds_reference_spec {
    const int32_t* fds;  // one independent sequential stream per file
    uint32_t num_fds;
    int32_t use_uring;
    uint32_t depth;  // requests in flight per file
    uint64_t request_bytes;
    uint64_t region_bytes;   // streams wrap around within this much of a file
    uint64_t num_requests;   // per file
    uint64_t memory_bytes;   // per file; requests rotate through it
    uint32_t writes_per_16;  // 0 reads only, 16 writes only, 8 alternating
};

namespace nvme_ds {
namespace {

constexpr uint64_t kHugePageBytes = 2u << 20;

struct FreeDeleter {
    void operator()(char* memory) const { std::free(memory); }
};
using AlignedBuffer = std::unique_ptr<char, FreeDeleter>;

AlignedBuffer make_buffer(uint64_t num_bytes) {
    const uint64_t rounded = (num_bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    AlignedBuffer buffer(static_cast<char*>(std::aligned_alloc(kHugePageBytes, rounded)));
    if (!buffer) throw std::bad_alloc();
    ::madvise(buffer.get(), rounded,
              MADV_HUGEPAGE);  // as the engine's callers do: small pages cost up to half of the read rate
    for (uint64_t i = 0; i < num_bytes;
         i += sizeof(uint64_t))  // not zeros: a device or hypervisor may special-case them
        *reinterpret_cast<uint64_t*>(buffer.get() + i) = i * 0x9e3779b97f4a7c15ull + 1;
    return buffer;
}

struct Request {
    bool write;
    uint64_t offset;
};

// Rotating through as much memory as the engine's caller uses: a buffer that stays in the CPU's cache flatters a device.
char* memory_at(const nds_reference_spec& spec, char* memory, uint64_t index) {
    return memory + index % (spec.memory_bytes / spec.request_bytes) * spec.request_bytes;
}

// Reads walk the lower half of the region and writes the upper half when both happen, the whole region otherwise.
Request request_at(const nds_reference_spec& spec, uint64_t index) {
    const uint64_t share = spec.writes_per_16;
    const uint64_t before = index * share / 16;
    const bool write = (index + 1) * share / 16 > before;
    if (share == 0 || share == 16) return {write, index * spec.request_bytes % spec.region_bytes};
    const uint64_t half = spec.region_bytes / 2 / spec.request_bytes * spec.request_bytes;
    const uint64_t nth = write ? before : index - before;
    return {write, nth * spec.request_bytes % half + (write ? half : 0)};
}

int stream_with_threads(const nds_reference_spec& spec, int fd, char* memory) {
    std::atomic<uint64_t> next{0};
    std::atomic<int> failed{0};
    const auto body = [&] {
        for (uint64_t i = next++; i < spec.num_requests && !failed; i = next++) {
            const Request request = request_at(spec, i);
            const off_t offset = static_cast<off_t>(request.offset);
            char* buffer = memory_at(spec, memory, i);
            const ssize_t result = request.write ? ::pwrite(fd, buffer, spec.request_bytes, offset)
                                                 : ::pread(fd, buffer, spec.request_bytes, offset);
            if (result != static_cast<ssize_t>(spec.request_bytes)) failed = result < 0 ? errno : EIO;
        }
    };
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < spec.depth; ++i) threads.emplace_back(body);
    for (std::thread& thread : threads) thread.join();
    return -failed.load();
}

#if NDS_HAVE_URING

void queue_request(const nds_reference_spec& spec, Ring& ring, int fd, char* memory, uint64_t index) {
    const Request request = request_at(spec, index);
    io_uring_sqe* sqe = ring.next_sqe();
    sqe->opcode = request.write ? IORING_OP_WRITE : IORING_OP_READ;
    sqe->fd = fd;
    sqe->addr = reinterpret_cast<uint64_t>(memory_at(spec, memory, index));
    sqe->len = static_cast<uint32_t>(spec.request_bytes);
    sqe->off = request.offset;
}

int stream_with_uring(const nds_reference_spec& spec, int fd, char* memory) {
    Ring ring(spec.depth);
    uint64_t next = 0, finished = 0;
    while (next < spec.depth && next < spec.num_requests) {
        queue_request(spec, ring, fd, memory, next++);
    }
    int error = 0;
    while (finished < next) {
        if (const int status = ring.submit(); status && status != -EAGAIN && status != -EBUSY) return status;
        if (const int status = ring.wait_for_completion()) return status;
        uint64_t unused = 0;
        int32_t result = 0;
        while (ring.next_cqe(&unused, &result)) {
            ++finished;
            if (result != static_cast<int32_t>(spec.request_bytes)) error = result < 0 ? result : -EIO;
            if (next < spec.num_requests && !error) queue_request(spec, ring, fd, memory, next++);
        }
    }
    return error;
}

#else

int stream_with_uring(const nds_reference_spec&, int, char*) { return -ENOSYS; }

#endif

int stream(const nds_reference_spec& spec, int fd, char* memory) {
    try {
        return spec.use_uring ? stream_with_uring(spec, fd, memory) : stream_with_threads(spec, fd, memory);
    } catch (const std::system_error& error) {
        return -error.code().value();
    } catch (...) {
        return -ENOMEM;
    }
}

}  // namespace
}  // namespace nvme_ds

// Runs all streams at once; the wall time in ns, or -errno.
NDS_EXPORT int64_t nds_reference_io(const nds_reference_spec* spec) noexcept {
    using namespace nvme_ds;
    try {
        std::vector<int> status(spec->num_fds, 0);
        std::vector<AlignedBuffer> memory;
        for (uint32_t i = 0; i < spec->num_fds; ++i) memory.push_back(make_buffer(spec->memory_bytes));
        std::vector<std::thread> streams;
        const int64_t begin = now_ns();
        for (uint32_t i = 0; i < spec->num_fds; ++i)
            streams.emplace_back([&, i] { status[i] = stream(*spec, spec->fds[i], memory[i].get()); });
        for (std::thread& thread : streams) thread.join();
        const int64_t elapsed = now_ns() - begin;
        for (int error : status)
            if (error) return error;
        return elapsed;
    } catch (...) {
        return -ENOMEM;
    }
}
