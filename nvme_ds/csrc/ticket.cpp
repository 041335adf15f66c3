#include "ticket.h"

#include <utility>

#include "clock.h"

namespace nvme_ds {

void Ticket::start(std::shared_ptr<Ticket> self) {
    if (parts.empty()) {
        done_ = true;
        volume_.reset();
        return;
    }
    remaining_.store(parts.size());
    self_ = std::move(self);
}

void Ticket::record_error(const Part& part, int error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.error) return;
    failure_ = {error, part.op, part.file_offset + part.done_bytes, part.remaining(), volume_->files()[part.file].path};
}

bool Ticket::leave_direct(const Part& part, int error) {
    std::lock_guard<std::mutex> lock(mutex_);
    bool first = false;
    if (!volume_->leave_direct(first)) return false;
    if (first)
        fallback_ = {error, part.op, part.file_offset + part.done_bytes, part.remaining(),
                     volume_->files()[part.file].path};
    return true;
}

void Ticket::part_finished() {
    if (remaining_.fetch_sub(1) != 1) return;
    std::shared_ptr<Ticket> self = std::move(self_);
    std::lock_guard<std::mutex> lock(mutex_);
    // The volume goes before anyone is told: a waiter may close it next and expect its files and locks to be free.
    volume_.reset();
    done_ = true;
    finished_.notify_all();
}

std::string Ticket::path_of(const Part& part) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return volume_ ? volume_->files()[part.file].path : std::string();
}

bool Ticket::done() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
}

bool Ticket::wait_until(int64_t deadline_ns) {
    std::unique_lock<std::mutex> lock(mutex_);
    return finished_.wait_until(lock, time_point_of(deadline_ns), [this] { return done_; });
}

int Ticket::failure(nds_failure& out) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const Failure& told = failure_.error ? failure_ : fallback_;
    if (told.error)
        fill_failure(out, told.error, static_cast<int>(told.op), told.offset, told.num_bytes, told.path);
    return failure_.error ? -failure_.error : fallback_.error ? kFellBack : 0;
}

int64_t TicketTable::insert(std::shared_ptr<Ticket> ticket) {
    std::lock_guard<std::mutex> lock(mutex_);
    ticket->id = next_id_;
    tickets_.emplace(next_id_, std::move(ticket));
    return next_id_++;
}

std::shared_ptr<Ticket> TicketTable::find(int64_t id) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tickets_.find(id);
    return found == tickets_.end() ? nullptr : found->second;
}

void TicketTable::forget(int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    tickets_.erase(id);
}

size_t TicketTable::size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return tickets_.size();
}

}  // namespace nvme_ds
