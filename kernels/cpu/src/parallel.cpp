#include "parallel.h"

#include <sys/mman.h>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
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

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins while `goes_on`, for about as long as the gap between two operations of a step, then gives
// its turn to others that want the core. False: it went on all the time.
template <class Condition>
bool spun_until_not(Condition goes_on, std::chrono::microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (goes_on()) {
    for (int i = 0; i < 32; ++i) pause_briefly();
    if (std::chrono::steady_clock::now() > end) return !goes_on();
  }
  return true;
}

// Where threads may run that help one which is running.
#if defined(__linux__)
class Processors {
 public:
  Processors() { sched_getaffinity(0, sizeof all_, &all_); }

  static int current() { return sched_getcpu(); }

  // On any but this one, if there is another.
  void keep_off(int processor, const std::vector<pthread_t>& threads) const {
    if (processor < 0 || processor >= CPU_SETSIZE) return;
    cpu_set_t others = all_;
    CPU_CLR(processor, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (pthread_t thread : threads) pthread_setaffinity_np(thread, sizeof others, &others);
  }

 private:
  cpu_set_t all_ = {};  // none where there are more than it has room for
};
#else
class Processors {
 public:
  static int current() { return -1; }
  template <class Threads>
  void keep_off(int, const Threads&) const {}
};
#endif

// Threads that join a job while it is open. Whoever the system has not woken in time is not waited
// for: on a machine that others use as well, a job never lasts longer than its caller alone would
// take, where an OpenMP team waits for its last member to get a core. The one pool is never destroyed,
// so it needs no order at exit. Only one job runs at a time; a second caller does its work alone.
class Pool {
 public:
  void run(Job& job, int num_threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    grow(num_threads - 1);
    make_room();
    places_ = num_threads - 1;
    open(job);
    job.work();
    close();
  }

 private:
  // The gate: a job's number in the upper half, kOpen, and how many have joined.
  using Gate = std::uint64_t;
  static constexpr Gate kOpen = 1u << 31, kCount = kOpen - 1;
  static constexpr std::chrono::microseconds kIdleSpin{100}, kEndSpin{20};

  static std::uint32_t number_of(Gate gate) { return static_cast<std::uint32_t>(gate >> 32); }

  void open(Job& job) {
    job_ = &job;
    num_left_.store(0, std::memory_order_relaxed);
    const Gate number = number_of(gate_.load(std::memory_order_relaxed)) + 1u;
    gate_.store(number << 32 | kOpen);
    if (num_asleep_.load() == 0) return;
    { std::lock_guard<std::mutex> guard(mutex_); }  // one that is about to sleep sleeps by now
    wake_.notify_all();
  }

  // Nobody joins any more; waits for those who did.
  void close() {
    const Gate last = gate_.fetch_and(~kOpen);
    const int num_joined = static_cast<int>(last & kCount);
    const auto is_busy = [&] { return num_left_.load(std::memory_order_acquire) < num_joined; };
    while (!spun_until_not(is_busy, kEndSpin)) std::this_thread::yield();
  }

  // Where the system gives no more threads, those there are do the work.
  void grow(int num_workers) {
    try {
      while (static_cast<int>(workers_.size()) < num_workers) {
        std::thread worker([this] { serve(); });
        workers_.push_back(worker.native_handle());
        worker.detach();
        caller_processor_ = -1;
      }
    } catch (const std::system_error&) {
    }
  }

  // The system may wake workers where the caller runs, even if others are idle. They would wait there
  // until it has done their share.
  void make_room() {
    const int processor = Processors::current();
    if (processor == caller_processor_) return;
    processors_.keep_off(processor, workers_);
    caller_processor_ = processor;
  }

  [[noreturn]] void serve() {
    for (std::uint32_t seen = 0;;) {
      const Gate gate = await(seen);
      seen = number_of(gate);
      if (!joined(gate)) continue;
      job_->work();
      num_left_.fetch_add(1, std::memory_order_release);
    }
  }

  // An open gate with another number than `seen`.
  Gate await(std::uint32_t seen) {
    const auto is_none = [&] { return !is_new(gate_.load(std::memory_order_acquire), seen); };
    if (!spun_until_not(is_none, kIdleSpin)) {
      std::unique_lock<std::mutex> guard(mutex_);
      num_asleep_.fetch_add(1);
      wake_.wait(guard, [&] { return is_new(gate_.load(), seen); });
      num_asleep_.fetch_sub(1);
    }
    return gate_.load();
  }

  static bool is_new(Gate gate, std::uint32_t seen) {
    return (gate & kOpen) && number_of(gate) != seen;
  }

  // Takes a place, unless the job is over or has none left: then its memory may be gone.
  bool joined(Gate gate) {
    const std::uint32_t number = number_of(gate);
    while (is_new(gate, number - 1) && number_of(gate) == number &&
           static_cast<int>(gate & kCount) < places_.load(std::memory_order_relaxed)) {
      if (gate_.compare_exchange_weak(gate, gate + 1)) return true;
    }
    return false;
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<Gate> gate_{0};
  alignas(64) std::atomic<int> num_left_{0}, num_asleep_{0}, places_{0};
  Job* job_ = nullptr;
  std::vector<std::thread::native_handle_type> workers_;
  Processors processors_;
  int caller_processor_ = -1;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Grows as it must, keeps nothing.
class Scratch {
 public:
  void* of(std::size_t num_bytes) {
    if (num_bytes > capacity_) {
      const std::size_t rounded = (num_bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, rounded));
      capacity_ = memory_ ? rounded : 0;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<void, Free> memory_;
  std::size_t capacity_ = 0;
};

}  // namespace

void parallel_for(i64 count, i64 grain, Task task, void* context) {
  const int num = wanted_threads.load(std::memory_order_relaxed);
  if (num == 1 || count <= grain) {
    if (count > 0) task(context, 0, count);
    return;
  }
  static Pool& pool = *new Pool;
  Job job{task, context, count, grain};
  pool.run(job, num);
}

void* scratch(std::size_t num_bytes) {
  thread_local Scratch memory;
  return memory.of(num_bytes);
}

void* shared_scratch(std::size_t num_bytes) {
  thread_local Scratch memory;
  return memory.of(num_bytes);
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

}  // namespace pilotlight
