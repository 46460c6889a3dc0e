// Vectors of 32-bit lanes and of the storage types. Knows no operation.
//
// Included once by each level_*.cpp, inside that level's namespace and compiled with that level's
// flags, so that nothing here may have external linkage: a function shared with another level could
// be the copy that uses instructions this machine lacks. The level sets LANES and HAS_BF16_DOT.

constexpr int kLanes = LANES;
constexpr i64 kLine = 64;  // bytes in a cache line

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef std::int32_t vi __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef std::int8_t vb __attribute__((vector_size(LANES)));
typedef std::uint8_t vub __attribute__((vector_size(LANES)));

struct bf16 {
  std::uint16_t bits;
};

inline i64 divide_up(i64 value, i64 by) { return (value + by - 1) / by; }

constexpr int power_of_two_from(i64 value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

inline i64 round_up(i64 value, i64 multiple) { return divide_up(value, multiple) * multiple; }

template <int... I, class Body>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, Body body) {
  (body(std::integral_constant<int, I>()), ...);
}

// body(0) ... body(N - 1), by numbers known to the compiler from the start: an array that is indexed
// with them stays in registers. `body` must itself be always_inline.
template <int N, class Body>
inline __attribute__((always_inline)) void unrolled(Body body) {
  unrolled(std::make_integer_sequence<int, N>(), body);
}

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

// Halves of 16 bits as words, and words that 16 bits hold as halves. GCC makes several instructions of
// __builtin_convertvector where there is one or two.
inline vu words_of(vh h) {
#if LANES == 16 && defined(__AVX512F__)
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif LANES == 8 && defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

inline vh halves_of(vu words) {
#if LANES == 16 && defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#elif LANES == 8 && defined(__AVX2__)
  const __m256i w = (__m256i)words;
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
#else
  return __builtin_convertvector(words, vh);
#endif
}

inline vh halves_of(vi words) {
#if LANES == 8 && defined(__AVX2__)
  const __m256i w = (__m256i)words;
  return (vh)_mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
#else
  return halves_of((vu)words);
#endif
}

inline vf widen(vh h) { return (vf)(words_of(h) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline vh narrow(vf v) {
#if HAS_BF16_DOT && !defined(PILOTLIGHT_EMULATE)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu is_nan = (vu)(v != v);
  return halves_of((rounded & ~is_nan) | (0x7fc0 & is_nan));
#endif
}

template <class Extent>
inline vf load(const float* from, Extent extent) { return load_raw<vf>(from, extent); }

template <class Extent>
inline vf load(const bf16* from, Extent extent) { return widen(load_raw<vh>(from, extent)); }

inline vf widen(vb b) {
#if LANES == 16 && defined(__AVX512F__)  // GCC takes the other way apart
  const vi wide = (vi)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)b);
#elif LANES == 8 && defined(__AVX2__)
  const vi wide = (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)b));
#else
  const vi wide = __builtin_convertvector(b, vi);
#endif
  return __builtin_convertvector(wide, vf);
}

template <class Extent>
inline vf load(const std::int8_t* from, Extent extent) { return widen(load_raw<vb>(from, extent)); }

template <class Extent>
inline void store(float* to, vf v, Extent extent) { store_raw(to, v, extent); }

template <class Extent>
inline void store(bf16* to, vf v, Extent extent) { store_raw(to, narrow(v), extent); }

// To the nearest integer, of two the even one; |v| <= 2^22.
inline vi rounded(vf v) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return (vi)(v + magic) - (vi)magic;
}

// Rounds to nearest even; |v| <= 127.
template <class Extent>
inline void store(std::int8_t* to, vf v, Extent extent) {
#if LANES == 8 && defined(__AVX2__)  // GCC takes the other way apart
  const __m128i halves = (__m128i)halves_of(rounded(v));
  store_raw(to, (vb)_mm_cvtsi128_si64(_mm_packs_epi16(halves, halves)), extent);
#else
  store_raw(to, __builtin_convertvector(rounded(v), vb), extent);
#endif
}

// Rounds to nearest even; |v| <= 32767.
template <class Extent>
inline void store(std::int16_t* to, vf v, Extent extent) {
  store_raw(to, halves_of(rounded(v)), extent);
}

// The value that a store and a load would give back.
inline vf rounded_to(vf v, const float*) { return v; }
inline vf rounded_to(vf v, const bf16*) { return widen(narrow(v)); }

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// NaN in `a` is lost, in `b` kept: keep the running maximum in `a`.
inline vf maximum(vf a, vf b) {
#if LANES == 8 && defined(__AVX__)  // GCC makes two instructions of the other
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}

// One vector of lanes from two, by lane number; GCC 11 has only the second spelling.
template <int... Lane>
inline vu shuffle(vu low, vu high) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(low, high, Lane...);
#else
  return __builtin_shuffle(low, high, vi{Lane...});
#endif
}

// Which of two vectors' lanes, numbered through, goes to lane `lane` when units of `unit` lanes are
// taken from both in turn; every lane of both is found once in the even and the odd such vector.
// Chosen so that each is one instruction: unpack inside 128 bits, and moves of whole 128 bits: where
// there are four of these, both moves take every other one of each vector.
constexpr int paired_lane(int unit, bool is_odd, int lane) {
  const int block = lane / 4 * 4, place = lane % 4;
  if (unit < 4) {
    return block + (is_odd ? 2 : 0) + (place / unit % 2 ? kLanes : 0) +
           (unit == 1 ? place / 2 : place % 2);
  }
  const int half = kLanes / 2;
  return lane / half * kLanes + lane % half / 4 * 8 + (is_odd ? 4 : 0) + place;
}

template <int Unit, bool IsOdd, int... Lane>
inline vu paired(vu low, vu high, std::integer_sequence<int, Lane...>) {
  return shuffle<paired_lane(Unit, IsOdd, Lane)...>(low, high);
}

template <int Unit, bool IsOdd>
inline vu paired(vu low, vu high) {
#if LANES == 16 && defined(__AVX512F__)  // GCC takes a slower instruction for most
  const __m512i a = (__m512i)low, b = (__m512i)high;
  if constexpr (Unit == 2) {
    return (vu)(IsOdd ? _mm512_maskz_unpackhi_epi64(0xff, a, b)
                      : _mm512_maskz_unpacklo_epi64(0xff, a, b));
  }
  if constexpr (Unit > 2) return (vu)_mm512_maskz_shuffle_i32x4(0xffff, a, b, IsOdd ? 0xdd : 0x88);
#endif
  return paired<Unit, IsOdd>(low, high, std::make_integer_sequence<int, kLanes>());
}

// Some of the kLanes / 2 steps in each of the passes, of Unit 1, 2, 4 ..., that transpose.
template <int Unit, int Step>
inline __attribute__((always_inline)) void transpose_step(vu (&rows)[kLanes]) {
  constexpr int i = Step / Unit * 2 * Unit + Step % Unit;
  const vu low = rows[i], high = rows[i + Unit];
  rows[i] = paired<Unit, false>(low, high);
  rows[i + Unit] = paired<Unit, true>(low, high);
}

// Where the passes leave column `column`: the first two have taken each other's turn.
constexpr int transposed_row(int column) {
  const int place = column % 4;
  return column - place + (place == 1 ? 2 : place == 2 ? 1 : place);
}

// rows[i][j] <-> rows[j][i].
template <int Unit = 1>
inline void transpose(vu (&rows)[kLanes]) {
  if constexpr (Unit < kLanes) {
    unrolled<kLanes / 2>([&](auto step) __attribute__((always_inline)) {
      transpose_step<Unit, step>(rows);
    });
    transpose<2 * Unit>(rows);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 4) std::swap(rows[i + 1], rows[i + 2]);
  }
}

// Lane i of the result combines all lanes of rows[i].
template <int Unit = 1, class Combine>
inline vf reduced(vf (&rows)[kLanes], Combine combine) {
  if constexpr (Unit < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * Unit) {
      const vu low = (vu)rows[i], high = (vu)rows[i + Unit];
      rows[i] = combine((vf)paired<Unit, false>(low, high), (vf)paired<Unit, true>(low, high));
    }
    return reduced<2 * Unit>(rows, combine);
  }
  return rows[0];
}

inline vf sums(vf (&rows)[kLanes]) {
  return reduced(rows, [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
}

inline vf maxima(vf (&rows)[kLanes]) {
  return reduced(rows, [](vf a, vf b) __attribute__((always_inline)) { return maximum(a, b); });
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
