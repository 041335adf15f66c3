// How a device's parts reach the kernel. A backend owns its threads; they end once the device is stopped and drained.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nvme_ds {

class Device;

enum class BackendKind : int32_t { kUring = 0, kThreads = 1 };

class Backend {
public:
    virtual ~Backend() = default;  // joins
    virtual void wake() = 0;       // something was pushed, or the device was stopped
    virtual bool exited_before(int64_t deadline_ns) = 0;
    virtual void detach() = 0;  // nobody will join; the backend and its device must then never be destroyed

    // Fixed buffers; -ENOTSUP where the backend has none.
    virtual int add_buffer(uint64_t address, uint64_t num_bytes);
    virtual void remove_buffer(uint64_t address);
};

std::unique_ptr<Backend> make_thread_backend(Device& device, unsigned num_threads);

// Throws std::system_error when a ring cannot be set up.
std::unique_ptr<Backend> make_uring_backend(Device& device, unsigned queue_depth);
int probe_uring(unsigned queue_depth);  // 0, or -errno that says why io_uring is out of the question here

}  // namespace nvme_ds
