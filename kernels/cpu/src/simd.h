// Vectors of 32-bit lanes and of the two storage types. Knows no operation.
//
// Included once by each level_*.cpp, inside that level's namespace and compiled with that level's
// flags, so that nothing here may have external linkage: a function shared with another level could
// be the copy that uses instructions this machine lacks. The level sets LANES and HAS_BF16_DOT.

constexpr int kLanes = LANES;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef std::int32_t vi __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t vh __attribute__((vector_size(2 * LANES)));

struct bf16 {
  std::uint16_t bits;
};

// How much of a vector a load or store touches.
struct Whole {};
struct Part {
  i64 count;  // 0 < count < kLanes
};

// Calls body(index, Whole or Part) over [0, size).
template <class Body>
inline void for_lanes(i64 size, Body body) {
  i64 i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, Whole{});
  if (i < size) body(i, Part{size - i});
}

template <class V>
inline V load_raw(const void* from, Whole) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Lanes beyond the part are zero.
template <class V>
inline V load_raw(const void* from, Part part) {
  V v = {};
  std::memcpy(&v, from, part.count * (sizeof v / kLanes));
  return v;
}

template <class V>
inline void store_raw(void* to, V v, Whole) {
  std::memcpy(to, &v, sizeof v);
}

template <class V>
inline void store_raw(void* to, V v, Part part) {
  std::memcpy(to, &v, part.count * (sizeof v / kLanes));
}

inline vf splat(float x) { return x - vf{}; }

inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline vh narrow(vf v) {
#if HAS_BF16_DOT
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu is_nan = (vu)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), vh);
#endif
}

template <class Extent>
inline vf load(const float* from, Extent extent) { return load_raw<vf>(from, extent); }

template <class Extent>
inline vf load(const bf16* from, Extent extent) { return widen(load_raw<vh>(from, extent)); }

template <class Extent>
inline void store(float* to, vf v, Extent extent) { store_raw(to, v, extent); }

template <class Extent>
inline void store(bf16* to, vf v, Extent extent) { store_raw(to, narrow(v), extent); }

// The value that a store and a load would give back.
inline vf rounded_to(vf v, const float*) { return v; }
inline vf rounded_to(vf v, const bf16*) { return widen(narrow(v)); }

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// NaN in `a` is lost, in `b` kept: keep the running maximum in `a`.
inline vf maximum(vf a, vf b) { return select(a > b, a, b); }

// One vector of lanes from two, by lane number; GCC 11 has only the second spelling.
template <int... Lane>
inline vu shuffle(vu low, vu high) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(low, high, Lane...);
#else
  return __builtin_shuffle(low, high, vi{Lane...});
#endif
}

template <int Distance, int... Lane>
inline void swap_halves(vu& low, vu& high, std::integer_sequence<int, Lane...>) {
  const vu first = shuffle<((Lane & Distance) ? kLanes + Lane - Distance : Lane)...>(low, high);
  high = shuffle<((Lane & Distance) ? kLanes + Lane : Lane + Distance)...>(low, high);
  low = first;
}

template <int Distance>
inline void swap_halves(vu& low, vu& high) {
  swap_halves<Distance>(low, high, std::make_integer_sequence<int, kLanes>());
}

// rows[i][j] <-> rows[j][i], by exchanging ever larger halves.
template <int Distance = 1>
inline void transpose(vu (&rows)[kLanes]) {
  if constexpr (Distance < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & Distance)) swap_halves<Distance>(rows[i], rows[i + Distance]);
    }
    transpose<2 * Distance>(rows);
  }
}

// Lane i of the result is the sum over the lanes of rows[i].
template <int Distance = 1>
inline vf sums(vf (&rows)[kLanes]) {
  if constexpr (Distance < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * Distance) {
      vu low = (vu)rows[i], high = (vu)rows[i + Distance];
      swap_halves<Distance>(low, high);
      rows[i] = (vf)low + (vf)high;
    }
    return sums<2 * Distance>(rows);
  }
  return rows[0];
}

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float maximum(vf v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// exp(x), relative error below 2e-7; 0 below -87.3, a large number above 88.3, NaN for NaN.
// Source: Cephes expf: exp(x) = 2^n exp(r), r = x - n ln 2, ln 2 in two parts.
inline vf exp(vf x) {
  const vi is_zero = x < splat(-87.3f);
  x = select(x > splat(88.3f), splat(88.3f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * splat(1.44269504088896341f) + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  return select(is_zero, vf{}, p * (vf)exponent);
}

// Runs body(index) over [0, count) on all threads, in pieces of `grain`.
template <class Body>
inline void parallel(i64 count, i64 grain, Body& body) {
  parallel_for(count, grain, [](void* context, i64 begin, i64 end) {
    Body& call = *static_cast<Body*>(context);
    for (i64 i = begin; i < end; ++i) call(i);
  }, &body);
}

// Memory for one call; false when there was none.
class Buffer {
 public:
  explicit Buffer(std::size_t num_bytes) : memory_(std::malloc(num_bytes + 1)) {}
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  explicit operator bool() const { return memory_ != nullptr; }

  template <class T>
  T* as() const { return static_cast<T*>(memory_); }

 private:
  void* memory_;
};

// Rows per piece so that a piece is worth handing to another thread.
inline i64 grain_for(i64 work_per_row) {
  const i64 rows = 32768 / (work_per_row + 1);
  return rows < 1 ? 1 : rows;
}
