#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cfenv>

namespace op_ds {
namespace {

// About 10 us: the gap between two chunks of one unit is shorter, a wake-up through the kernel is longer.
constexpr int kSpins = 300;

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Another library may have set flush-to-zero on the calling thread (and threads inherit it); results must not differ
// between the threads of a job, nor from a machine where nobody did.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  // Signals are the interpreter's: its main thread must be the one that Ctrl-C interrupts.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { worker_main(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop_workers();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() {
  const std::lock_guard<std::mutex> call(call_mutex_);
  stop_workers();
}

void ThreadPool::stop_workers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  job_posted_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::claim_blocks(const Job& job) noexcept {
  const DefaultFloatEnvironment environment;
  for (;;) {
    const int64_t block = next_block_.fetch_add(1, std::memory_order_relaxed);
    if (block >= job.num_blocks) return;
    job.call(job.context, block);
  }
}

void ThreadPool::run_job(const Job& job) {
  const std::lock_guard<std::mutex> call(call_mutex_);
  next_block_.store(0, std::memory_order_relaxed);
  if (workers_.empty() || job.num_blocks < 2) {
    claim_blocks(job);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = job;
    open_.store(true, std::memory_order_relaxed);
    posted_.fetch_add(1, std::memory_order_release);
  }
  job_posted_.notify_all();
  claim_blocks(job);
  close_job();
}

// Workers that have not woken by now are not waited for: closing the job keeps them out.
void ThreadPool::close_job() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_.store(false, std::memory_order_relaxed);
  }
  for (int spin = 0; spin < kSpins && active_.load(std::memory_order_relaxed) > 0; ++spin) relax();
  std::unique_lock<std::mutex> lock(mutex_);
  job_left_.wait(lock, [this] { return active_ == 0; });
}

// Returns with mutex_ free and the worker counted in active_, or false when the pool stops.
bool ThreadPool::await_job(uint64_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (posted_.load(std::memory_order_acquire) != seen || stopping_.load(std::memory_order_relaxed)) break;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  job_posted_.wait(lock, [&] { return stopping_ || (open_ && posted_ != seen); });
  if (stopping_) return false;
  ++active_;
  return true;
}

void ThreadPool::worker_main() {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "op_ds");
#endif
  uint64_t seen = 0;
  while (await_job(seen)) {
    // Stable while this worker is active: the next job is posted only after everyone has left this one.
    seen = posted_.load(std::memory_order_relaxed);
    claim_blocks(job_);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--active_ == 0) job_left_.notify_one();
  }
}

}  // namespace op_ds
