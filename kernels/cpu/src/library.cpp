// The C interface of the shared library: which level runs, on which threads, and one entry point
// per operation. Knows no tensors: it gets pointers, and checks every index before it is followed.

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "level.h"
#include "parallel.h"

#define PILOTLIGHT_API extern "C" __attribute__((visibility("default")))

using namespace pilotlight;

namespace {

// Raised with every change to a function below, to an argument structure, or to how weights are packed.
constexpr int kAbiVersion = 11;

enum Status : int { kDone = 0, kNoMemory = 1, kBadIndex = 2 };

// A call of one of the operations below, as it was recorded.
struct Call {
  int (*operation)(i64 dtype, const void* arguments);
  i64 dtype;
  const void* arguments;
};

struct NamedLevel {
  const char* name;
  bool (*runs_here)();
  const Level* level;
};

#if defined(PILOTLIGHT_EMULATE)

[[maybe_unused]] bool has_avx512() { return true; }
[[maybe_unused]] bool has_avx512_bf16() { return true; }
[[maybe_unused]] bool has_amx() { return true; }

#elif defined(__x86_64__)

[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512_bf16() {
  // Whatever has the one has the other.
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

// The tiles' registers are large: the processor has them, the system saves them, and it must be asked
// to. Its answer holds for all threads.
[[maybe_unused]] bool has_amx() {
  if (!has_avx512_bf16()) return false;
  unsigned a, b, c, d, saved, unused;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmx = kAmxBf16 | kAmxTile;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) return false;
  asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((saved & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

#if defined(PILOTLIGHT_LEVEL_amx)
// What the matrix unit does; all else as without it.
const Level kAmx = [] {
  Level level = avx512_bf16::level;
  level.packed_linear = amx::level.packed_linear;
  level.packed_gate_up = amx::level.packed_gate_up;
  level.multiply_only = amx::level.multiply_only;
  return level;
}();
#endif

// Best first; the last runs everywhere. __builtin_cpu_supports asks the operating system as well.
const NamedLevel kLevels[] = {
#if defined(PILOTLIGHT_LEVEL_amx)
    {"amx", has_amx, &kAmx},
#endif
#if defined(PILOTLIGHT_LEVEL_avx512_bf16)
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16::level},
#endif
#if defined(PILOTLIGHT_LEVEL_avx512)
    {"avx512", has_avx512, &avx512::level},
#endif
#if defined(PILOTLIGHT_LEVEL_avx2)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     &avx2::level},
#endif
    {"generic", [] { return true; }, &generic::level},
};

const NamedLevel* best() {
  const NamedLevel* named = kLevels;
  while (!named->runs_here()) ++named;
  return named;
}

std::atomic<const NamedLevel*>& chosen() {
  static std::atomic<const NamedLevel*> level{best()};
  return level;
}

const Level& level() { return *chosen().load(std::memory_order_relaxed)->level; }

int status(bool is_done) { return is_done ? kDone : kNoMemory; }

bool is_within(i64 index, i64 begin, i64 end) { return index >= begin && index < end; }

bool has_good_indices(const RopeStoreArgs& a) {
  const i64 num_slots = a.cache.num_blocks * a.cache.block_size;
  for (i64 row = 0; row < a.num_rows; ++row) {
    if (!is_within(a.positions[row], 0, a.num_positions)) return false;
    if (!is_within(a.slots[row], -1, num_slots)) return false;
  }
  return true;
}

// Blocks that have left every query's window may be anything: their memory is used again.
bool has_good_blocks(const AttentionArgs& a, i64 r, i64 num_queries) {
  const i64 end = a.context_lens[r], size = a.cache.block_size;
  const i64 first = a.sliding_window > 0 ? end - num_queries - a.sliding_window + 1 : 0;
  if (end > a.num_table_blocks * size) return false;
  for (i64 i = first > 0 ? first / size : 0; i * size < end; ++i) {
    if (!is_within(a.block_tables[r * a.table_stride + i], 0, a.cache.num_blocks)) return false;
  }
  return true;
}

bool has_good_indices(const AttentionArgs& a) {
  for (i64 r = 0; r < a.num_sequences; ++r) {
    const i64 num_queries = i64{a.query_start[r + 1]} - a.query_start[r];
    if (!is_within(num_queries, 0, i64{a.context_lens[r]} + 1)) return false;
    if (num_queries > 0 && !has_good_blocks(a, r, num_queries)) return false;
  }
  return a.query_start[0] == 0 && a.query_start[a.num_sequences] <= a.num_rows;
}

bool has_good_indices(const PackedEmbeddingArgs& a) {
  for (i64 row = 0; row < a.num_rows; ++row) {
    if (!is_within(a.token_ids[row], 0, a.num_outputs)) return false;
  }
  return true;
}

bool has_good_indices(const QuantizedLinearArgs& a) {
  for (i64 i = 0; a.order && i < a.num_inputs; ++i) {
    if (!is_within(a.order[i], 0, a.num_inputs)) return false;
  }
  return true;
}

}  // namespace

PILOTLIGHT_API int pilotlight_abi_version() { return kAbiVersion; }

// The levels this machine can run, best first; null past the last.
PILOTLIGHT_API const char* pilotlight_level_name(int index) {
  for (const NamedLevel& named : kLevels) {
    if (named.runs_here() && index-- == 0) return named.name;
  }
  return nullptr;
}

PILOTLIGHT_API const char* pilotlight_level() { return chosen().load()->name; }

PILOTLIGHT_API bool pilotlight_use_level(const char* name) {
  for (const NamedLevel& named : kLevels) {
    if (std::strcmp(named.name, name) != 0 || !named.runs_here()) continue;
    chosen().store(&named);
    return true;
  }
  return false;
}

PILOTLIGHT_API void pilotlight_set_num_threads(int num_threads) { set_num_threads(num_threads); }

PILOTLIGHT_API int pilotlight_rms_norm(DType dtype, const RmsNormArgs* a) {
  return status(level().rms_norm(dtype, *a));
}

PILOTLIGHT_API int pilotlight_sample(DType dtype, const SampleArgs* a) {
  return status(level().sample(dtype, *a));
}

PILOTLIGHT_API int pilotlight_silu_mul(DType dtype, const SiluMulArgs* a) {
  return status(level().silu_mul(dtype, *a));
}

PILOTLIGHT_API int pilotlight_rope_store_kv(DType dtype, const RopeStoreArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().rope_store_kv(dtype, *a));
}

PILOTLIGHT_API int pilotlight_rope_store_kv_int8(DType dtype, const RopeStoreArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().rope_store_kv_int8(dtype, *a));
}

PILOTLIGHT_API int pilotlight_rope_store_kv_int16(DType dtype, const RopeStoreArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().rope_store_kv_int16(dtype, *a));
}

PILOTLIGHT_API int pilotlight_paged_attention(DType dtype, const AttentionArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().paged_attention(dtype, *a));
}

PILOTLIGHT_API int pilotlight_paged_attention_int8(DType dtype, const AttentionArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().paged_attention_int8(dtype, *a));
}

PILOTLIGHT_API int pilotlight_paged_attention_int16(DType dtype, const AttentionArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().paged_attention_int16(dtype, *a));
}

PILOTLIGHT_API int pilotlight_linear(DType dtype, const LinearArgs* a) {
  return status(level().linear(dtype, *a));
}

PILOTLIGHT_API int pilotlight_packed_linear(DType dtype, const PackedLinearArgs* a) {
  return status(level().packed_linear(dtype, *a));
}

PILOTLIGHT_API int pilotlight_packed_gate_up(DType dtype, const PackedLinearArgs* a) {
  return status(level().packed_gate_up(dtype, *a));
}

PILOTLIGHT_API int pilotlight_packed_embedding(DType dtype, const PackedEmbeddingArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().packed_embedding(dtype, *a));
}

PILOTLIGHT_API int pilotlight_quantized_linear(DType dtype, const QuantizedLinearArgs* a) {
  if (!has_good_indices(*a)) return kBadIndex;
  return status(level().quantized_linear(dtype, *a));
}

PILOTLIGHT_API int pilotlight_pack_panels(DType dtype, const PackArgs* a) {
  return status(level().pack_panels(dtype, *a));
}

// Calls one after the other, up to the first that fails.
PILOTLIGHT_API int pilotlight_run(i64 num_calls, const Call* calls) {
  for (const Call* call = calls; call < calls + num_calls; ++call) {
    if (const int status = call->operation(call->dtype, call->arguments)) return status;
  }
  return kDone;
}

PILOTLIGHT_API int pilotlight_read_memory(DType dtype, const LimitArgs* a) {
  return status(level().read_memory(dtype, *a));
}

PILOTLIGHT_API int pilotlight_multiply_only(DType dtype, const LimitArgs* a) {
  return status(level().multiply_only(dtype, *a));
}
