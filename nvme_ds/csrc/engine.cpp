#include "engine.h"

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "clock.h"

namespace nvme_ds {
namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;
using WriteLock = std::unique_lock<std::shared_mutex>;

constexpr uint8_t kSyncPriority = 0;  // whoever waits for it has nothing else to do

}  // namespace

std::unique_ptr<Backend> Engine::make_backend(Device& device) const {
    if (options_.backend == static_cast<int32_t>(BackendKind::kUring))
        return make_uring_backend(device, options_.queue_depth);
    return make_thread_backend(device, options_.num_threads);
}

int Engine::add_device(double bandwidth_bps) {
    WriteLock held(mutex_);
    if (closed_) return -ECANCELED;
    const bool threads = options_.backend == static_cast<int32_t>(BackendKind::kThreads);
    const unsigned depth = threads ? std::min(options_.queue_depth, options_.num_threads) : options_.queue_depth;
    Unit unit;
    unit.device = std::make_unique<Device>(depth, bandwidth_bps, faults_, busy_);
    unit.backend = make_backend(*unit.device);
    for (const auto& [address, num_bytes] : buffers_)
        if (const int error = unit.backend->add_buffer(address, num_bytes)) buffer_error_ = error;
    units_.push_back(std::move(unit));
    return static_cast<int>(units_.size()) - 1;
}

int64_t Engine::add_volume(const nds_volume_spec& spec) {
    WriteLock held(mutex_);
    if (closed_) return -ECANCELED;
    std::vector<uint32_t> pattern(spec.pattern, spec.pattern + spec.pattern_length);
    for (uint32_t file : pattern)
        if (file >= spec.num_files) return -EINVAL;
    std::vector<VolumeFile> files;
    for (uint32_t i = 0; i < spec.num_files; ++i) {
        if (spec.devices[i] < 0 || static_cast<size_t>(spec.devices[i]) >= units_.size()) return -EINVAL;
        files.push_back({spec.fds[i], spec.paths[i], units_[static_cast<size_t>(spec.devices[i])].device.get()});
    }
    volumes_[next_volume_] =
        std::make_shared<Volume>(std::move(files), Layout(std::move(pattern), spec.num_files, spec.stripe_bytes),
                                 spec.num_bytes, static_cast<Volume::Direct>(spec.direct));
    return next_volume_++;
}

std::shared_ptr<Volume> Engine::volume(int64_t id) const {
    ReadLock held(mutex_);
    const auto found = volumes_.find(id);
    return found == volumes_.end() ? nullptr : found->second;
}

int Engine::close_volume(int64_t id) {
    WriteLock held(mutex_);
    return volumes_.erase(id) ? 0 : -EBADF;
}

void Engine::split(Ticket& ticket, const Volume& volume, Op op, uint64_t offset, uint64_t address, uint64_t num_bytes,
                   int priority) {
    ticket.parts.reserve(num_bytes / options_.request_bytes + 2);
    while (num_bytes > 0) {
        const Extent extent = volume.layout().extent_at(offset, std::min(num_bytes, options_.request_bytes));
        const VolumeFile& file = volume.files()[extent.file];
        ticket.parts.push_back({&ticket, file.device, file.fd, extent.file, op, static_cast<uint8_t>(priority),
                                volume.direct(), false, 0, extent.file_offset, reinterpret_cast<char*>(address),
                                extent.num_bytes, 0, offset, 0});
        offset += extent.num_bytes;
        address += extent.num_bytes;
        num_bytes -= extent.num_bytes;
    }
}

Backend& Engine::backend_of(const Device& device) const {
    const auto found =
        std::find_if(units_.begin(), units_.end(), [&](const Unit& unit) { return unit.device.get() == &device; });
    return *found->backend;
}

void Engine::dispatch(Ticket& ticket, const Volume& volume) {
    std::vector<std::vector<Part*>> per_file(volume.files().size());
    for (Part& part : ticket.parts) per_file[part.file].push_back(&part);
    for (size_t file = 0; file < per_file.size(); ++file) {
        if (per_file[file].empty()) continue;
        Device& device = *volume.files()[file].device;
        if (device.push(per_file[file])) backend_of(device).wake();
    }
}

int64_t Engine::submit(int64_t volume_id, Op op, uint64_t offset, uint64_t address, uint64_t num_bytes, int priority) {
    const std::shared_ptr<Volume> target = volume(volume_id);
    if (!target) return -EBADF;
    if (priority < 0 || priority >= kNumPriorities || (op != Op::kRead && op != Op::kWrite)) return -EINVAL;
    if ((offset | address | num_bytes) % kAlignment) return -EINVAL;
    if (num_bytes > target->num_bytes() || offset > target->num_bytes() - num_bytes) return -ERANGE;
    auto ticket = std::make_shared<Ticket>(target, volume_id);
    split(*ticket, *target, op, offset, address, num_bytes, priority);
    return launch(ticket, *target);
}

// On the backend's threads and not on the caller's: a device that never answers must not take the caller with it.
int64_t Engine::submit_sync(int64_t volume_id) {
    const std::shared_ptr<Volume> target = volume(volume_id);
    if (!target) return -EBADF;
    auto ticket = std::make_shared<Ticket>(target, volume_id);
    uint32_t index = 0;
    for (const VolumeFile& file : target->files())
        ticket->parts.push_back({ticket.get(), file.device, file.fd, index++, Op::kSync, kSyncPriority, false, false, 0,
                                 0, nullptr, 0, 0, 0, 0});
    return launch(ticket, *target);
}

int64_t Engine::launch(const std::shared_ptr<Ticket>& ticket, const Volume& volume) {
    ticket->start(ticket);
    const int64_t id = tickets_.insert(ticket);
    ReadLock held(mutex_);
    dispatch(*ticket, volume);
    return id;
}

int Engine::wait(int64_t ticket_id, int64_t timeout_us, nds_failure& failure) {
    const std::shared_ptr<Ticket> ticket = tickets_.find(ticket_id);
    if (!ticket) return -ESRCH;
    if (timeout_us <= 0 && !ticket->done()) return -EINPROGRESS;
    if (!ticket->wait_until(now_ns() + timeout_us * 1000))
        return report_stall(*ticket, failure) ? kStalled : -EINPROGRESS;
    tickets_.forget(ticket_id);
    return ticket->failure(failure);
}

// The ticket goes on: the kernel may still write into its memory.
bool Engine::report_stall(const Ticket& ticket, nds_failure& failure) const {
    const auto part = std::find_if(ticket.parts.begin(), ticket.parts.end(), [this](const Part& p) {
        return p.device->stuck(p, options_.stall_timeout_ns);
    });
    if (part == ticket.parts.end()) return false;
    fill_failure(failure, ETIMEDOUT, static_cast<int>(part->op), part->file_offset, part->num_bytes,
                 ticket.path_of(*part));
    return true;
}

int Engine::done(int64_t ticket_id) const {
    const std::shared_ptr<Ticket> ticket = tickets_.find(ticket_id);
    return ticket ? ticket->done() : -ESRCH;
}

int Engine::register_buffer(uint64_t address, uint64_t num_bytes) {
    WriteLock held(mutex_);
    if (std::any_of(buffers_.begin(), buffers_.end(), [&](const auto& known) { return known.first == address; }))
        return -EEXIST;
    buffers_.emplace_back(address, num_bytes);
    for (const Unit& unit : units_)
        if (const int error = unit.backend->add_buffer(address, num_bytes)) buffer_error_ = error;
    return 0;
}

int Engine::unregister_buffer(uint64_t address) {
    WriteLock held(mutex_);
    const auto known =
        std::find_if(buffers_.begin(), buffers_.end(), [&](const auto& b) { return b.first == address; });
    if (known == buffers_.end()) return -ENOENT;
    buffers_.erase(known);
    for (const Unit& unit : units_) unit.backend->remove_buffer(address);
    return 0;
}

int Engine::device_counters(int index, nds_counters& out) const {
    ReadLock held(mutex_);
    if (index < 0 || static_cast<size_t>(index) >= units_.size()) return -EINVAL;
    units_[static_cast<size_t>(index)].device->read_counters(out);
    return 0;
}

int Engine::buffer_error() const {
    ReadLock held(mutex_);
    return buffer_error_;
}

void Engine::reset_counters() {
    busy_.reset(now_ns());
    ReadLock held(mutex_);
    for (const Unit& unit : units_) unit.device->reset_counters();
}

int Engine::close(int64_t timeout_us) {
    {
        WriteLock held(mutex_);
        closed_ = true;
        volumes_.clear();
        for (const Unit& unit : units_) {
            unit.device->stop();
            unit.backend->wake();
        }
    }
    const int64_t deadline_ns = now_ns() + timeout_us * 1000;
    ReadLock held(mutex_);
    for (const Unit& unit : units_)
        if (!unit.backend->exited_before(deadline_ns))
            return unit.device->silent(options_.stall_timeout_ns) ? kStalled : -EINPROGRESS;
    return 0;
}

void Engine::abandon() {
    close(0);
    WriteLock held(mutex_);
    for (const Unit& unit : units_) unit.backend->detach();
}

void Engine::watch(size_t capacity) {
    ReadLock held(mutex_);
    for (const Unit& unit : units_) unit.device->watch(capacity);
}

int64_t Engine::read_spans(int index, nds_span* out, size_t capacity, uint64_t* lost) const {
    ReadLock held(mutex_);
    if (index < 0 || static_cast<size_t>(index) >= units_.size()) return -EINVAL;
    return units_[static_cast<size_t>(index)].device->read_spans(out, capacity, lost);
}

void Engine::inject(const nds_faults& faults) {
    faults_.configure(faults);
    ReadLock held(mutex_);
    for (const Unit& unit : units_) unit.backend->wake();  // may hold requests that the former faults stalled
}

}  // namespace nvme_ds
