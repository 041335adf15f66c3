// Persistent threads that share numbered blocks of work. The caller is one of them: a pool of one thread starts none.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace op_ds {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // throws std::system_error when a thread cannot be started
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls body(block) once for every block in [0, num_blocks), in no order, and returns when all have returned.
  // Any thread may call; calls run one after another.
  template <class Body>
  void run(int64_t num_blocks, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_job({[](void* context, int64_t block) { (*static_cast<Plain*>(context))(block); },
             const_cast<void*>(static_cast<const void*>(&body)), num_blocks});
  }

 private:
  struct Job {
    void (*call)(void* context, int64_t block);
    void* context;
    int64_t num_blocks;
  };

  void run_job(const Job& job);
  void claim_blocks(const Job& job) noexcept;
  void close_job();
  void worker_main();
  bool await_job(uint64_t seen);
  void stop_workers();

  std::mutex call_mutex_;  // one job at a time
  std::mutex mutex_;       // guards job_ and open_, and goes with the two conditions
  std::condition_variable job_posted_, job_left_;
  Job job_{};
  std::atomic<int> active_{0};       // workers inside the current job; written under mutex_
  std::atomic<uint64_t> posted_{0};  // number of the last posted job
  std::atomic<bool> open_{false};    // the posted job still takes workers
  std::atomic<bool> stopping_{false};
  // Its own cache line: sixteen threads add to it while the rest of the pool is only read.
  alignas(64) std::atomic<int64_t> next_block_{0};
  std::vector<std::thread> workers_;
};

}  // namespace op_ds
