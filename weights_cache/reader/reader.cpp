// Reads a stretch of a file in chunks, in parallel, into the slots of a ring. Plain C interface; no
// Python: its threads never wait for an interpreter that is busy importing torch.
//
// A slot belongs to the reader until its chunk is taken, then to the taker until it is released. A
// chunk is handed over when every byte of it is there, or with the reason why not: a short read is
// continued, an interrupted one repeated, the end of the file before the end of a chunk is an error.

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

namespace {

constexpr int kAbiVersion = 1;
constexpr int64_t kDirectBytes = 512;  // the least that O_DIRECT moves

struct Chunk {
  int64_t index;
  int slot;
  int64_t num_bytes;  // that are there
  int error;          // errno; with 0 and too few bytes the file ended
};

struct Plan {
  int descriptor;
  int direct_descriptor;  // -1: none
  int64_t offset;
  int64_t num_bytes;
  int64_t chunk_bytes;
  char* ring;
};

class Reader {
 public:
  Reader(const Plan& plan, int num_slots, int num_threads)
      : plan_(plan), num_chunks_((plan.num_bytes + plan.chunk_bytes - 1) / plan.chunk_bytes) {
    for (int slot = 0; slot < num_slots; ++slot) free_.push_back(slot);
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Reader() { stop(); }

  // 1: a chunk; 0: all were taken; -1: stopped.
  int take(Chunk* chunk) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_changed_.wait(lock, [this] {
      return is_stopped_ || !done_.empty() || num_taken_ == num_chunks_;
    });
    if (is_stopped_) return -1;
    if (done_.empty()) return 0;
    *chunk = done_.front();
    done_.pop_front();
    if (++num_taken_ == num_chunks_) done_changed_.notify_all();
    return 1;
  }

  void release(int slot) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(slot);
    }
    work_changed_.notify_one();
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_stopped_ = true;
    }
    work_changed_.notify_all();
    done_changed_.notify_all();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_changed_.wait(lock, [this] {
        return is_stopped_ || next_ == num_chunks_ || !free_.empty();
      });
      if (is_stopped_ || next_ == num_chunks_) return;
      Chunk chunk{next_++, free_.front(), 0, 0};
      free_.pop_front();
      lock.unlock();
      read(&chunk);
      lock.lock();
      done_.push_back(chunk);
      done_changed_.notify_one();
      if (next_ == num_chunks_) work_changed_.notify_all();
    }
  }

  void read(Chunk* chunk) const {
    const int64_t start = chunk->index * plan_.chunk_bytes;
    const int64_t wanted = std::min(plan_.chunk_bytes, plan_.num_bytes - start);
    char* slot = plan_.ring + chunk->slot * plan_.chunk_bytes;
    int descriptor = plan_.direct_descriptor >= 0 ? plan_.direct_descriptor : plan_.descriptor;
    while (chunk->num_bytes < wanted) {
      const ssize_t got = pread(descriptor, slot + chunk->num_bytes, wanted - chunk->num_bytes,
                                plan_.offset + start + chunk->num_bytes);
      if (got > 0) {
        chunk->num_bytes += got;
      } else if (got < 0 && errno == EINTR) {
        continue;
      } else if (descriptor == plan_.direct_descriptor && (got == 0 || errno == EINVAL)) {
        // Past this file system's liking: the rest by way of the page cache.
      } else {
        chunk->error = got < 0 ? errno : 0;
        return;
      }
      const bool is_aligned = chunk->num_bytes % kDirectBytes == 0;
      if (got <= 0 || !is_aligned) descriptor = plan_.descriptor;
    }
  }

  const Plan plan_;
  const int64_t num_chunks_;
  std::mutex mutex_;
  std::condition_variable work_changed_, done_changed_;
  std::deque<int> free_;
  std::deque<Chunk> done_;
  int64_t next_ = 0, num_taken_ = 0;
  bool is_stopped_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int pilotlight_reader_abi_version() { return kAbiVersion; }

// Null: no threads or no memory.
EXPORT void* pilotlight_reader_start(int descriptor, int direct_descriptor, int64_t offset,
                                     int64_t num_bytes, int64_t chunk_bytes, void* ring,
                                     int num_slots, int num_threads) {
  const Plan plan{descriptor, direct_descriptor, offset, num_bytes, chunk_bytes,
                  static_cast<char*>(ring)};
  try {
    return new Reader(plan, num_slots, num_threads);
  } catch (...) {
    return nullptr;
  }
}

EXPORT int pilotlight_reader_take(void* reader, void* chunk) {
  return static_cast<Reader*>(reader)->take(static_cast<Chunk*>(chunk));
}

EXPORT void pilotlight_reader_release(void* reader, int slot) {
  static_cast<Reader*>(reader)->release(slot);
}

// Nobody may be taking when it is freed; who takes meanwhile is told that it stopped.
EXPORT void pilotlight_reader_stop(void* reader) { static_cast<Reader*>(reader)->stop(); }

EXPORT void pilotlight_reader_free(void* reader) { delete static_cast<Reader*>(reader); }
