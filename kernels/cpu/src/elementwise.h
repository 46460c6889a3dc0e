// Norms, the gated activation, and rotary positions with the store to the cache.
// Included by each level_*.cpp after simd.h; see there.

template <class T>
inline float sum_of_squares(const T* x, i64 size) {
  vf total = {};
  for_lanes(size, [&](i64 i, auto extent) {
    const vf v = load(x + i, extent);
    total += v * v;
  });
  return sum(total);
}

template <class T>
inline float add_and_sum_squares(const T* x, T* residual, i64 size) {
  vf total = {};
  for_lanes(size, [&](i64 i, auto extent) {
    const vf v = rounded_to(load(x + i, extent) + load(residual + i, extent), x);
    store(residual + i, v, extent);
    total += v * v;
  });
  return sum(total);
}

template <class T>
inline void norm_row(const RmsNormArgs& a, const T* x, T* residual, T* out) {
  const T* weight = static_cast<const T*>(a.weight);
  const float squares =
      residual ? add_and_sum_squares(x, residual, a.size) : sum_of_squares(x, a.size);
  const T* source = residual ? residual : x;
  const vf factor = splat(1.0f / __builtin_sqrtf(squares / a.size + a.eps));
  for_lanes(a.size, [&](i64 i, auto extent) {
    const vf v = rounded_to(load(source + i, extent) * factor, x);
    store(out + i, v * load(weight + i, extent), extent);
  });
}

template <class T>
bool rms_norm(const RmsNormArgs& a) {
  auto body = [&](i64 row) {
    const i64 outer = row / a.num_inner, inner = row % a.num_inner;
    const T* x = static_cast<const T*>(a.x) + outer * a.outer_stride + inner * a.inner_stride;
    T* residual = a.residual ? static_cast<T*>(a.residual) + row * a.residual_stride : nullptr;
    norm_row(a, x, residual, static_cast<T*>(a.out) + row * a.size);
  };
  parallel(a.num_outer * a.num_inner, grain_for(a.size), body);
  return true;
}

template <class T>
bool silu_mul(const SiluMulArgs& a) {
  auto body = [&](i64 row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * a.row_stride;
    T* out = static_cast<T*>(a.out) + row * a.size;
    for_lanes(a.size, [&](i64 i, auto extent) {
      const vf x = load(gate + i, extent);
      const vf silu = rounded_to(x / (splat(1.0f) + exp(-x)), gate);
      store(out + i, silu * load(gate + a.size + i, extent), extent);
    });
  };
  parallel(a.num_rows, grain_for(4 * a.size), body);
  return true;
}

template <class T>
inline void rotate(const T* from, T* to, const float* cos_sin, i64 head_dim) {
  const i64 half = head_dim / 2;
  for_lanes(half, [&](i64 i, auto extent) {
    const vf cos = load(cos_sin + i, extent), sin = load(cos_sin + half + i, extent);
    const vf first = load(from + i, extent), second = load(from + half + i, extent);
    store(to + i, first * cos - second * sin, extent);
    store(to + half + i, second * cos + first * sin, extent);
  });
}

template <class T>
inline void store_row(const RopeStoreArgs& a, i64 row, const float* cos_sin) {
  const PagedCache& cache = a.cache;
  const i64 slot = a.slots[row], dim = cache.head_dim, size = cache.num_heads * dim;
  const i64 block = slot / cache.block_size, offset = slot % cache.block_size * size;
  const T* k = static_cast<const T*>(a.k) + row * a.k_stride;
  T* keys = static_cast<T*>(cache.keys) + block * cache.key_block_stride + offset;
  for (i64 h = 0; h < cache.num_heads; ++h) rotate(k + h * dim, keys + h * dim, cos_sin, dim);
  T* values = static_cast<T*>(cache.values) + block * cache.value_block_stride + offset;
  std::memcpy(values, static_cast<const T*>(a.v) + row * a.v_stride, size * sizeof(T));
}

template <class T>
bool rope_store_kv(const RopeStoreArgs& a) {
  const i64 dim = a.cache.head_dim;
  auto body = [&](i64 row) {
    const float* cos_sin = a.cos_sin + a.positions[row] * dim;
    T* q = static_cast<T*>(a.q) + row * a.q_stride;
    for (i64 h = 0; h < a.num_heads; ++h) rotate(q + h * dim, q + h * dim, cos_sin, dim);
    if (a.slots[row] >= 0) store_row<T>(a, row, cos_sin);
  };
  parallel(a.num_rows, grain_for((a.num_heads + 2 * a.cache.num_heads) * dim), body);
  return true;
}
