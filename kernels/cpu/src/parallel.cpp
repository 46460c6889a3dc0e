#include "parallel.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pilotlight {
namespace {

std::atomic<int> wanted_threads{1};
std::atomic<OpenMpParallel> openmp{nullptr};

struct Job {
  Task task;
  void* context;
  i64 count, grain;
  std::atomic<i64> next{0};

  void work() {
    for (;;) {
      const i64 begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      task(context, begin, std::min(count, begin + grain));
    }
  }
};

// Threads of our own, for a process without OpenMP. They sleep between jobs: without a second pool
// to fight, the wake-up is all they cost. The one pool is never destroyed, so it needs no order at
// exit. Only one job runs at a time; a second caller does its work alone.
class Pool {
 public:
  void run(Job& job, int num_threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    grow(num_threads - 1);
    {
      std::lock_guard<std::mutex> guard(mutex_);
      job_ = &job;
      places_ = num_threads - 1;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> guard(mutex_);
    places_ = 0;
    done_.wait(guard, [this] { return num_busy_ == 0; });
    job_ = nullptr;
  }

 private:
  // Where the system gives no more threads, those there are do the work.
  void grow(int num_workers) {
    try {
      for (; num_workers_ < num_workers; ++num_workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      wake_.wait(guard, [this] { return places_ > 0; });
      --places_;
      ++num_busy_;
      Job* job = job_;
      guard.unlock();
      job->work();
      guard.lock();
      if (--num_busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int num_workers_ = 0, places_ = 0, num_busy_ = 0;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

void parallel_for(i64 count, i64 grain, Task task, void* context) {
  const int num = wanted_threads.load(std::memory_order_relaxed);
  if (num == 1 || count <= grain) {
    if (count > 0) task(context, 0, count);
    return;
  }
  Job job{task, context, count, grain};
  if (const OpenMpParallel parallel = openmp.load(std::memory_order_relaxed)) {
    // Always the same number: libgomp ends and restarts threads when the team's size changes.
    parallel([](void* raw) { static_cast<Job*>(raw)->work(); }, &job, num, 0);
  } else {
    static Pool& pool = *new Pool;
    pool.run(job, num);
  }
}

void* scratch(std::size_t num_bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t capacity = 0;
  if (num_bytes > capacity) {
    const std::size_t rounded = (num_bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded));
    capacity = memory ? rounded : 0;
  }
  return memory.get();
}

void expect_large_pages(void* memory, std::size_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2 << 20;
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (start + num_bytes) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void set_num_threads(int num_threads) { wanted_threads.store(std::max(1, num_threads)); }

int num_threads() { return wanted_threads.load(); }

void use_openmp(OpenMpParallel parallel) { openmp.store(parallel); }

}  // namespace pilotlight
