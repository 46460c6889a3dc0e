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

template <class From, class To>
inline void rotate(const From* from, To* to, const float* cos_sin, i64 head_dim) {
  const i64 half = head_dim / 2;
  for_lanes(half, [&](i64 i, auto extent) {
    const vf cos = load(cos_sin + i, extent), sin = load(cos_sin + half + i, extent);
    const vf first = load(from + i, extent), second = load(from + half + i, extent);
    store(to + i, first * cos - second * sin, extent);
    store(to + half + i, second * cos + first * sin, extent);
  });
}

// Of integers of a cache.
template <class To>
constexpr float kLargestOf = sizeof(To) == 1 ? 127 : kLargestCached;

// Writes from / scale, rounded, and returns the scale: the largest magnitude becomes kLargestOf<To>.
// What is not finite makes the scale NaN, so that it shows.
template <class From, class To>
inline float quantise(const From* from, To* to, i64 size) {
  vf most = {}, zeros = {};
  for_lanes(size, [&](i64 i, auto extent) {
    const vf v = load(from + i, extent);
    most = maximum(most, maximum(v, -v));
    zeros += v * 0.0f;
  });
  const float highest = maximum(most), factor = highest > kLeast ? kLargestOf<To> / highest : 0;
  for_lanes(size, [&](i64 i, auto extent) {
    store(to + i, load(from + i, extent) * factor, extent);
  });
  return highest / kLargestOf<To> + sum(zeros);
}

// A token's keys and values of one head into their panels; `integers`: room for a head.
template <class T>
inline void store_in_panels(const RopeStoreArgs& a, i64 slot, i64 head, const float* rotated,
                            const T* value, std::int16_t* integers) {
  const PagedCache& cache = a.cache;
  const i64 block = slot / cache.block_size, token = slot % cache.block_size, dim = cache.head_dim;
  const i64 place = token % kTokensPerPanel;
  const i64 first = token / kTokensPerPanel * kTokensPerPanel * cache.num_heads + head * kTokensPerPanel;
  auto* keys = static_cast<std::int16_t*>(cache.keys) + block * cache.key_block_stride + first * dim;
  auto* values =
      static_cast<std::int16_t*>(cache.values) + block * cache.value_block_stride + first * dim;
  cache.key_scales[block * cache.key_scale_stride + first + place] = quantise(rotated, integers, dim);
  for (i64 d = 0; d < dim; d += 2) {
    std::memcpy(keys + d * kTokensPerPanel + 2 * place, integers + d, 2 * sizeof *integers);
  }
  cache.value_scales[block * cache.value_scale_stride + first + place] = quantise(value, integers, dim);
  values += place / 2 * 2 * kPanel + place % 2;
  for (i64 d = 0; d < dim; d += kPanel, values += kTokensPerPanel * kPanel) {
    for (i64 i = 0; i < kPanel; ++i) values[2 * i] = integers[d + i];
  }
}

// T: of the rows; C: of the cache; `rotated`: room for two heads where that is another.
template <class T, class C>
inline void store_row(const RopeStoreArgs& a, i64 row, const float* cos_sin, float* rotated) {
  const PagedCache& cache = a.cache;
  const i64 slot = a.slots[row], dim = cache.head_dim;
  const i64 block = slot / cache.block_size, first = slot % cache.block_size * cache.num_heads;
  const T* k = static_cast<const T*>(a.k) + row * a.k_stride;
  const T* v = static_cast<const T*>(a.v) + row * a.v_stride;
  C* keys = static_cast<C*>(cache.keys) + block * cache.key_block_stride + first * dim;
  C* values = static_cast<C*>(cache.values) + block * cache.value_block_stride + first * dim;
  if constexpr (std::is_same<C, T>::value) {
    for (i64 h = 0; h < cache.num_heads; ++h) rotate(k + h * dim, keys + h * dim, cos_sin, dim);
    std::memcpy(values, v, cache.num_heads * dim * sizeof(T));
  } else if constexpr (std::is_same<C, Int16>::value) {
    for (i64 h = 0; h < cache.num_heads; ++h) {
      rotate(k + h * dim, rotated, cos_sin, dim);
      auto* integers = reinterpret_cast<std::int16_t*>(rotated + dim);
      store_in_panels(a, slot, h, rotated, v + h * dim, integers);
    }
  } else {
    float* key_scales = cache.key_scales + block * cache.key_scale_stride + first;
    float* value_scales = cache.value_scales + block * cache.value_scale_stride + first;
    for (i64 h = 0; h < cache.num_heads; ++h) {
      rotate(k + h * dim, rotated, cos_sin, dim);
      key_scales[h] = quantise(rotated, keys + h * dim, dim);
      value_scales[h] = quantise(v + h * dim, values + h * dim, dim);
    }
  }
}

template <class T, class C>
bool rope_store_kv(const RopeStoreArgs& a) {
  const i64 dim = a.cache.head_dim;
  bool has_memory = true;
  auto body = [&](i64 row) {
    const float* cos_sin = a.cos_sin + a.positions[row] * dim;
    auto* rotated = static_cast<float*>(scratch(2 * dim * sizeof(float)));
    if (!rotated) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    T* q = static_cast<T*>(a.q) + row * a.q_stride;
    for (i64 h = 0; h < a.num_heads; ++h) rotate(q + h * dim, q + h * dim, cos_sin, dim);
    if (a.slots[row] >= 0) store_row<T, C>(a, row, cos_sin, rotated);
  };
  parallel(a.num_rows, grain_for((a.num_heads + 2 * a.cache.num_heads) * dim), body);
  return has_memory;
}
