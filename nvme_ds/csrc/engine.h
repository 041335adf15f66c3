// Devices, volumes and tickets of one engine, and the way from a transfer to its parts.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "abi.h"
#include "backend.h"
#include "busy_clock.h"
#include "clock.h"
#include "device.h"
#include "faults.h"
#include "ticket.h"
#include "volume.h"

namespace nvme_ds {

class Engine {
public:
    explicit Engine(const nds_engine_options& options) : options_(options) {}

    // All of these return -errno on failure.
    int add_device(double bandwidth_bps);
    int64_t add_volume(const nds_volume_spec& spec);
    int close_volume(int64_t id);
    int64_t submit(int64_t volume_id, Op op, uint64_t offset, uint64_t address, uint64_t num_bytes, int priority);
    int64_t submit_sync(int64_t volume_id);
    int wait(int64_t ticket_id, int64_t timeout_us, nds_failure& failure);
    int done(int64_t ticket_id) const;
    int register_buffer(uint64_t address, uint64_t num_bytes);
    int unregister_buffer(uint64_t address);
    int device_counters(int index, nds_counters& out) const;
    int64_t num_tickets() const { return static_cast<int64_t>(tickets_.size()); }
    int64_t busy_ns() const { return static_cast<int64_t>(busy_.total_ns(now_ns())); }
    int buffer_error() const;
    void reset_counters();
    void watch(size_t capacity);  // spans per device to record from now on; 0: none
    int64_t read_spans(int index, nds_span* out, size_t capacity, uint64_t* lost) const;  // how many there are
    void inject(const nds_faults& faults);
    int close(int64_t timeout_us);
    void abandon();  // close(), and nobody joins the threads: the engine must never be destroyed

private:
    struct Unit {
        std::unique_ptr<Device> device;
        std::unique_ptr<Backend> backend;  // after the device, so that its threads end before the device goes
    };

    std::unique_ptr<Backend> make_backend(Device& device) const;
    std::shared_ptr<Volume> volume(int64_t id) const;
    void split(Ticket& ticket, const Volume& volume, Op op, uint64_t offset, uint64_t address, uint64_t num_bytes,
               int priority);
    void dispatch(Ticket& ticket, const Volume& volume);
    int64_t launch(const std::shared_ptr<Ticket>& ticket, const Volume& volume);
    bool report_stall(const Ticket& ticket, nds_failure& failure) const;
    Backend& backend_of(const Device& device) const;

    nds_engine_options options_;
    Faults faults_;
    BusyClock busy_;
    TicketTable tickets_;
    mutable std::shared_mutex mutex_;  // devices, volumes, buffers: changed at set-up, read by every submit
    std::vector<Unit> units_;
    std::unordered_map<int64_t, std::shared_ptr<Volume>> volumes_;
    int64_t next_volume_ = 1;
    std::vector<std::pair<uint64_t, uint64_t>> buffers_;
    int buffer_error_ = 0;
    bool closed_ = false;
};

}  // namespace nvme_ds
