// What one instruction-set level offers, and the arguments of each operation.
// Knows no Python and no torch: raw pointers, strides in elements. The semantics are those of
// kernels/reference.
#pragma once

#include <cstdint>

namespace pilotlight {

using i64 = std::int64_t;
using i32 = std::int32_t;

// Of weights: with those of 16-bit integers go rows and results of bf16.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kInt16 = 2 };

struct RmsNormArgs {
  const void* x;         // [num_outer, num_inner, size]
  void* residual;        // null, or [num_outer, size]: x is added to it and the sum is normalised
  const void* weight;    // [size]
  void* out;             // contiguous
  i64 num_outer, num_inner, size;
  i64 outer_stride, inner_stride, residual_stride;
  float eps;
};

// How a row is drawn: kernels/draws.py.
struct Draw {
  float temperature;
  i32 top_k;
  float top_p, min_p;
  double uniform;
};

struct SampleArgs {
  const void* logits;  // [num_rows, size]
  const Draw* draws;   // [num_rows]
  i32* out;            // [num_rows]
  i64 num_rows, size, row_stride;
};

struct SiluMulArgs {
  const void* gate_up;   // [num_rows, 2 * size]
  void* out;             // [num_rows, size], contiguous
  i64 num_rows, size, row_stride;
};

// Keys and values of the rows' dtype; or int8, each head of a token with a scale that multiplies it; or
// int16, with such scales, and all in another order: kernels/cache_panels.py.
struct PagedCache {
  void* keys;            // [num_blocks, block_size, num_heads, head_dim], contiguous inside a block
  void* values;
  float* key_scales;     // null, or [num_blocks, block_size, num_heads], contiguous inside a block
  float* value_scales;
  i64 num_blocks, block_size, num_heads, head_dim;
  i64 key_block_stride, value_block_stride;
  i64 key_scale_stride, value_scale_stride;  // from block to block
};

struct RopeStoreArgs {
  void* q;               // [num_rows, num_heads, head_dim], heads contiguous
  const void* k;         // [num_rows, cache.num_heads, head_dim], heads contiguous
  const void* v;
  const float* cos_sin;  // [num_positions, head_dim]
  const i32* positions;
  const i32* slots;
  PagedCache cache;
  i64 num_rows, num_heads, num_positions;
  i64 q_stride, k_stride, v_stride;
};

struct AttentionArgs {
  const void* q;         // [num_rows, num_heads, head_dim], heads contiguous
  void* out;             // [num_rows, num_heads * head_dim], contiguous
  PagedCache cache;
  const i32* block_tables;  // [num_sequences, num_table_blocks]
  const i32* query_start;
  const i32* context_lens;
  i64 num_rows, num_heads, q_stride;
  i64 num_sequences, num_table_blocks, table_stride;
  i64 sliding_window;
  float scale;
};

struct LinearArgs {
  const void* x;         // [num_rows, num_inputs]
  const void* weight;    // [num_outputs, num_inputs], contiguous
  const void* bias;      // null, or [num_outputs]
  void* out;             // [num_rows, num_outputs], contiguous
  i64 num_rows, num_inputs, num_outputs, row_stride;
};

// Weights in panels of 16 outputs; see packed.h.
struct PackedLinearArgs {
  const void* x;         // [num_rows, num_inputs]
  const void* weight;    // panels
  const void* bias;      // null, or [num_outputs]
  void* out;             // [num_rows, num_outputs], contiguous
  i64 num_rows, num_inputs, num_outputs, row_stride;
};

struct PackArgs {
  const void* first;     // [num_outputs, num_inputs], contiguous
  const void* second;    // null, or another such matrix, whose panels follow the first's in turn
  void* out;
  i64 num_outputs, num_inputs;
};

struct PackedEmbeddingArgs {
  const i32* token_ids;
  const void* weight;    // panels
  void* out;             // [num_rows, num_inputs], contiguous
  i64 num_rows, num_inputs, num_outputs;
};

// Weights of 4 or 8 bits in panels of 16 outputs; see quantized.h.
struct QuantizedLinearArgs {
  const void* x;               // [num_rows, num_inputs]
  const std::uint32_t* words;  // panels
  const float* scales;         // [panels, groups, 16]
  const float* zeros;          // null: 2^(bits - 1) for all; or [panels, groups, 16]
  const i32* order;            // null, or [num_inputs]: which input each column of the matrix takes
  const void* bias;            // null, or [num_outputs]
  void* out;                   // [num_rows, num_outputs], contiguous
  float* rows;                 // scratch: [num_rows, num_inputs up to a whole word]
  float* group_sums;           // scratch: [num_rows, blocks, 2]; see quantized.h
  i64 num_rows, num_inputs, num_outputs, row_stride, bits, group_size;
};

// Measurements of the machine; see limits.h.
struct LimitArgs {
  const void* memory;    // `amount` bytes to be read, or null
  float* out;            // [num_outs], at least two, the first a number to multiply by
  i64 amount, num_outs;
};

// Every function returns false when it cannot get memory; nothing else can fail here.
struct Level {
  bool (*rms_norm)(DType, const RmsNormArgs&);
  bool (*silu_mul)(DType, const SiluMulArgs&);
  bool (*sample)(DType, const SampleArgs&);
  bool (*rope_store_kv)(DType, const RopeStoreArgs&);
  bool (*rope_store_kv_int8)(DType, const RopeStoreArgs&);
  bool (*rope_store_kv_int16)(DType, const RopeStoreArgs&);
  bool (*paged_attention)(DType, const AttentionArgs&);
  bool (*paged_attention_int8)(DType, const AttentionArgs&);
  bool (*paged_attention_int16)(DType, const AttentionArgs&);
  bool (*linear)(DType, const LinearArgs&);
  bool (*packed_linear)(DType, const PackedLinearArgs&);
  bool (*packed_gate_up)(DType, const PackedLinearArgs&);
  bool (*packed_embedding)(DType, const PackedEmbeddingArgs&);
  bool (*quantized_linear)(DType, const QuantizedLinearArgs&);
  bool (*pack_panels)(DType, const PackArgs&);
  bool (*read_memory)(DType, const LimitArgs&);
  bool (*multiply_only)(DType, const LimitArgs&);
};

namespace generic { extern const Level level; }
namespace avx2 { extern const Level level; }
namespace avx512 { extern const Level level; }
namespace avx512_bf16 { extern const Level level; }
namespace amx { extern const Level level; }

}  // namespace pilotlight
