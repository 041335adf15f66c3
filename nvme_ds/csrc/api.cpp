// Entry points. Engines are named by number, never by pointer, so that a call that comes too late gets -EBADF; a thread
// inside a call keeps its engine alive.
#include <cerrno>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "engine.h"

namespace nvme_ds {
namespace {

struct Registry {
    std::mutex mutex;
    int64_t next = 1;
    std::unordered_map<int64_t, std::shared_ptr<Engine>> engines;
    std::vector<std::shared_ptr<Engine>> abandoned;
};

// Never destroyed: at process exit an engine that was not closed may still have threads.
Registry& registry() {
    static Registry* instance = new Registry;
    return *instance;
}

std::shared_ptr<Engine> find(int64_t handle) {
    std::lock_guard<std::mutex> held(registry().mutex);
    const auto found = registry().engines.find(handle);
    return found == registry().engines.end() ? nullptr : found->second;
}

// No exception may cross into ctypes.
template <typename Body>
auto guarded(Body body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const std::system_error& error) {
        return -(error.code().value() ? error.code().value() : EIO);
    } catch (const std::bad_alloc&) {
        return -ENOMEM;
    } catch (...) {
        return -EIO;
    }
}

template <typename Body>
auto with_engine(int64_t handle, Body body) noexcept -> decltype(body(std::declval<Engine&>())) {
    return guarded([&]() -> decltype(body(std::declval<Engine&>())) {
        const std::shared_ptr<Engine> engine = find(handle);
        if (!engine) return -EBADF;
        return body(*engine);
    });
}

}  // namespace
}  // namespace nvme_ds

using namespace nvme_ds;

NDS_EXPORT int32_t nds_abi_version() noexcept { return kAbiVersion; }

NDS_EXPORT int32_t nds_uring_probe(uint32_t queue_depth) noexcept {
    return guarded([&] { return probe_uring(queue_depth); });
}

NDS_EXPORT int64_t nds_engine_create(const nds_engine_options* options) noexcept {
    return guarded([&]() -> int64_t {
        auto engine = std::make_shared<Engine>(*options);
        std::lock_guard<std::mutex> held(registry().mutex);
        registry().engines[registry().next] = std::move(engine);
        return registry().next++;
    });
}

// Stops submitting and waits up to timeout_us for the kernel to finish; -EINPROGRESS: call again; kStalled: the same,
// and a device has stopped answering.
NDS_EXPORT int32_t nds_engine_close(int64_t handle, int64_t timeout_us) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.close(timeout_us); });
}

// For an engine that close() cannot end: its handle is gone, all that its threads may still touch stays.
NDS_EXPORT int32_t nds_engine_abandon(int64_t handle) noexcept {
    return guarded([&] {
        std::shared_ptr<Engine> engine = find(handle);
        if (!engine) return -EBADF;
        {
            std::lock_guard<std::mutex> held(registry().mutex);
            registry().abandoned.push_back(engine);
            registry().engines.erase(handle);
        }
        engine->abandon();
        return 0;
    });
}

// Only after close() returned 0: joins threads that have already left their loops.
NDS_EXPORT int32_t nds_engine_destroy(int64_t handle) noexcept {
    return guarded([&] {
        std::shared_ptr<Engine> engine = find(handle);
        if (!engine) return -EBADF;
        std::lock_guard<std::mutex> held(registry().mutex);
        registry().engines.erase(handle);
        return 0;
    });
}

NDS_EXPORT int32_t nds_device_add(int64_t handle, double bandwidth_bps) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.add_device(bandwidth_bps); });
}

NDS_EXPORT int32_t nds_device_counters(int64_t handle, int32_t device, nds_counters* out) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.device_counters(device, *out); });
}

NDS_EXPORT int32_t nds_watch(int64_t handle, uint64_t capacity) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.watch(capacity), 0; });
}

// How many spans of the device are recorded, of which the first `capacity` are copied; `lost` requests found no room.
NDS_EXPORT int64_t nds_spans(int64_t handle, int32_t device, nds_span* out, uint64_t capacity, uint64_t* lost) noexcept {
    return with_engine(handle,
                       [&](Engine& engine) -> int64_t { return engine.read_spans(device, out, capacity, lost); });
}

NDS_EXPORT int32_t nds_counters_reset(int64_t handle) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.reset_counters(), 0; });
}

NDS_EXPORT int64_t nds_volume_add(int64_t handle, const nds_volume_spec* spec) noexcept {
    return with_engine(handle, [&](Engine& engine) -> int64_t { return engine.add_volume(*spec); });
}

NDS_EXPORT int32_t nds_volume_close(int64_t handle, int64_t volume) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.close_volume(volume); });
}

NDS_EXPORT int64_t nds_submit(int64_t handle, int64_t volume, int32_t op, uint64_t offset, uint64_t address,
                              uint64_t num_bytes, int32_t priority) noexcept {
    return with_engine(handle, [&](Engine& engine) -> int64_t {
        return engine.submit(volume, static_cast<Op>(op), offset, address, num_bytes, priority);
    });
}

NDS_EXPORT int64_t nds_submit_sync(int64_t handle, int64_t volume) noexcept {
    return with_engine(handle, [&](Engine& engine) -> int64_t { return engine.submit_sync(volume); });
}

// -EINPROGRESS: not done; kStalled: the same, and its device has stopped answering, which `failure` describes.
NDS_EXPORT int32_t nds_wait(int64_t handle, int64_t ticket, int64_t timeout_us, nds_failure* failure) noexcept {
    failure->error = 0;
    return with_engine(handle, [&](Engine& engine) { return engine.wait(ticket, timeout_us, *failure); });
}

NDS_EXPORT int32_t nds_done(int64_t handle, int64_t ticket) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.done(ticket); });
}

NDS_EXPORT int64_t nds_busy_ns(int64_t handle) noexcept {
    return with_engine(handle, [&](Engine& engine) -> int64_t { return engine.busy_ns(); });
}

// Why some registered buffer is not fixed on some device (it is still usable): -errno, or 0.
NDS_EXPORT int32_t nds_buffer_error(int64_t handle) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.buffer_error(); });
}

NDS_EXPORT int64_t nds_num_tickets(int64_t handle) noexcept {
    return with_engine(handle, [&](Engine& engine) -> int64_t { return engine.num_tickets(); });
}

NDS_EXPORT int32_t nds_buffer_register(int64_t handle, uint64_t address, uint64_t num_bytes) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.register_buffer(address, num_bytes); });
}

NDS_EXPORT int32_t nds_buffer_unregister(int64_t handle, uint64_t address) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.unregister_buffer(address); });
}

NDS_EXPORT int32_t nds_inject(int64_t handle, const nds_faults* faults) noexcept {
    return with_engine(handle, [&](Engine& engine) { return engine.inject(*faults), 0; });
}
