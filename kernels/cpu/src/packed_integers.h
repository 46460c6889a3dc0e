// Rows of bf16 times weights of 16 bits, for levels that multiply pairs of those but not of bf16.
// Included by each level_*.cpp after packed.h; see there. kernels/layout_names.py defines the layout,
// panel16-int16, kernels/layouts.py how weights become integers.
//
// A panel begins with whole lines that hold, for each block of 128 inputs and each output, the exponent
// of the power of two that multiplies its weights; then come the words, pairs of integers. A row's part
// of a block becomes integers with a scale of its own, so small that the sum of a block's products is
// exact in 32 bits: weights are below 2^13, and what a row has of a block adds up to 2^18 at most, all
// as magnitudes. Blocks are added up in floats, one chain.
//
// The bounds share 31 bits out between weights and rows. Of normally distributed numbers the rounding
// is 0.004 and 0.011 % (root mean square, of theirs); a result's, to bf16, is 0.17 %.

struct Int16 {
  std::int16_t value;
};

constexpr i64 kIntegerBlock = 128;  // inputs
constexpr i64 kIntegerBlockWords = kIntegerBlock / 2;
constexpr int kWeightBits = 13;
constexpr float kLargestInteger = 32767;
constexpr float kLargestSum = (1 << 18) - kIntegerBlock / 2;  // rounding adds a half to each
constexpr float kLeast = 1e-37f;  // what is below is nothing: its inverse must still be a float

template <>
struct Storage<Int16> {
  using Value = bf16;
  using RowElement = std::uint32_t;
};

template <>
struct PackedShape<Int16> {
  static constexpr i64 kPerWord = 2, kPerRowWord = 1;
  static constexpr i64 kWordUnit = kIntegerBlockWords, kPrefetchBytes = 768;
  static constexpr bool kTakesOnce = true;

  static i64 num_words(i64 num_inputs) { return divide_up(num_inputs, kPerWord); }
  static i64 num_blocks(i64 num_words) { return divide_up(num_words, kIntegerBlockWords); }
  static i64 front_words(i64 num_words) {
    return round_up(num_blocks(num_words) * kPanel, kLine) / 4;
  }
  static i64 front_words_before(i64 first_word) { return num_blocks(first_word) * kPanel / 4; }
  static i64 panel_words(i64 num_words) { return front_words(num_words) + num_words * kPanel; }
  // Behind a row's words lie the scales of its blocks.
  static i64 row_size(i64 slab_words) { return slab_words + num_blocks(slab_words); }
};

// A word of each of some rows, and of a panel.
struct WordArgs {
  const std::uint32_t* x;
  i64 row_size;
  const std::uint32_t* weight;
  const char* ahead;
  i64 ahead_step;
};

// total[row] += the products of both halves, added.
template <int Rows>
inline __attribute__((always_inline)) void add_word(vi (&total)[Rows][kPanelVectors], WordArgs& at) {
  __builtin_prefetch(at.ahead, 0, 3);
  vu right[kPanelVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) right[v] = load_raw<vu>(at.weight + v * kLanes, Whole{});
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const vu left = splat_word(at.x + r * at.row_size);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      add_integers<Rows * kPanelVectors>(total[r][v], left, right[v]);
      keep_order(total[r][v]);
    }
  }
  ++at.x;
  at.weight += kPanel;
  at.ahead += at.ahead_step;
}

// total = the sums of some words, at most a block's, from `at` on, which moves behind them.
template <int Rows>
inline __attribute__((always_inline)) void add_block(vi (&total)[Rows][kPanelVectors], WordArgs& at,
                                                     i64 num_words) {
  std::memset(total, 0, sizeof total);
  for (; num_words > 0; --num_words) add_word(total, at);
}

#if LANES == 8 && defined(__AVX2__)

// Twelve sums, two weights, a word and a product are all the registers there are. GCC does not see that
// they are enough, and keeps sums in memory.
#define PILOTLIGHT_ROWS_1(each) each("0", "1", "(%[x])")
#define PILOTLIGHT_ROWS_2(each) PILOTLIGHT_ROWS_1(each) each("2", "3", "(%[x],%[row])")
#define PILOTLIGHT_ROWS_3(each) PILOTLIGHT_ROWS_2(each) each("4", "5", "(%[x],%[row],2)")
#define PILOTLIGHT_ROWS_4(each) PILOTLIGHT_ROWS_3(each) each("6", "7", "(%[x3])")
#define PILOTLIGHT_ROWS_5(each) PILOTLIGHT_ROWS_4(each) each("8", "9", "(%[x3],%[row])")
#define PILOTLIGHT_ROWS_6(each) PILOTLIGHT_ROWS_5(each) each("10", "11", "(%[x3],%[row],2)")
#define PILOTLIGHT_CLEAR(first, second, place)                                                       \
  "vpxor %%ymm" first ", %%ymm" first ", %%ymm" first "\n\t"                                         \
  "vpxor %%ymm" second ", %%ymm" second ", %%ymm" second "\n\t"
#define PILOTLIGHT_ADD(first, second, place)                                                         \
  "vpbroadcastd " place ", %%ymm14\n\t"                                                              \
  "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                                           \
  "vpaddd %%ymm15, %%ymm" first ", %%ymm" first "\n\t"                                               \
  "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                                           \
  "vpaddd %%ymm14, %%ymm" second ", %%ymm" second "\n\t"
#define PILOTLIGHT_ADD_NEXT(first, second, place) PILOTLIGHT_ADD(first, second, "4" place)
#define PILOTLIGHT_STORE(first, second, place)                                                       \
  "vmovdqu %%ymm" first ", 32*" first "(%[total])\n\t"                                               \
  "vmovdqu %%ymm" second ", 32*" second "(%[total])\n\t"
#define PILOTLIGHT_ADD_BLOCK(rows)                                                                   \
  inline __attribute__((always_inline)) void add_block(vi (&total)[rows][2], WordArgs& at,           \
                                                       i64 num_words) {                              \
    const std::uint32_t* x3 = at.x + 3 * at.row_size;                                                \
    i64 num_pairs = num_words / 2;                                                                   \
    asm volatile(PILOTLIGHT_ROWS_##rows(PILOTLIGHT_CLEAR)                                            \
                 "test %[pairs], %[pairs]\n\t"                                                       \
                 "je 2f\n\t"                                                                         \
                 ".p2align 5\n"                                                                      \
                 "1:\n\t"                                                                            \
                 "vmovdqu (%[weight]), %%ymm12\n\t"                                                  \
                 "vmovdqu 32(%[weight]), %%ymm13\n\t"                                                \
                 "prefetcht0 (%[ahead])\n\t"                                                         \
                 PILOTLIGHT_ROWS_##rows(PILOTLIGHT_ADD)                                              \
                 "vmovdqu 64(%[weight]), %%ymm12\n\t"                                                \
                 "vmovdqu 96(%[weight]), %%ymm13\n\t"                                                \
                 "prefetcht0 (%[ahead],%[step])\n\t"                                                 \
                 PILOTLIGHT_ROWS_##rows(PILOTLIGHT_ADD_NEXT)                                         \
                 "lea (%[ahead],%[step],2), %[ahead]\n\t"                                            \
                 "add $128, %[weight]\n\t"                                                           \
                 "add $8, %[x]\n\t"                                                                  \
                 "add $8, %[x3]\n\t"                                                                 \
                 "dec %[pairs]\n\t"                                                                  \
                 "jne 1b\n"                                                                          \
                 "2:\n\t"                                                                            \
                 PILOTLIGHT_ROWS_##rows(PILOTLIGHT_STORE)                                            \
                 : [weight] "+r"(at.weight), [x] "+r"(at.x), [x3] "+r"(x3), [ahead] "+r"(at.ahead),  \
                   [pairs] "+r"(num_pairs)                                                           \
                 : [row] "r"(at.row_size * 4), [step] "r"(at.ahead_step), [total] "r"(&total)        \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",   \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");            \
    if (num_words % 2 == 1) add_word(total, at);                                                     \
  }

PILOTLIGHT_ADD_BLOCK(1)
PILOTLIGHT_ADD_BLOCK(2)
PILOTLIGHT_ADD_BLOCK(3)
PILOTLIGHT_ADD_BLOCK(4)
PILOTLIGHT_ADD_BLOCK(5)
PILOTLIGHT_ADD_BLOCK(6)

#endif

// Of two, by their exponents as floats have them.
inline vf powers(const std::uint8_t* exponents) {
  const vub bytes = load_raw<vub>(exponents, Whole{});
#if LANES == 8 && defined(__AVX2__)  // GCC takes the other way apart
  return (vf)((vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)) << 23);
#else
  return (vf)(__builtin_convertvector(bytes, vu) << 23);
#endif
}

// sums[row][0 ... 15] += rows times a panel, or = where nothing is there yet.
template <int Rows>
__attribute__((noinline)) void multiply_integers(const TileArgs<Int16>& t, float* sums, i64 stride,
                                                 bool is_first) {
  WordArgs at = {t.x, t.row_size, t.weight, t.ahead, t.ahead_step};
  // Between what the panel before has fetched and what the first word fetches lies a front.
  const i64 front_bytes = PackedShape<Int16>::front_words(t.num_words) * 4;
  for (i64 back = front_bytes; back > 0; back -= kLine) __builtin_prefetch(t.ahead - back, 0, 3);
  const auto* exponents = reinterpret_cast<const std::uint8_t*>(t.exponents);
  const std::uint32_t* scales = t.x + t.slab_words;
  for (i64 left = t.num_words; left > 0; left -= kIntegerBlockWords) {
    vi total[Rows][kPanelVectors];
    add_block(total, at, left < kIntegerBlockWords ? left : kIntegerBlockWords);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const vf scale = powers(exponents + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        float* sum = sums + r * stride + v * kLanes;
        const vf before = is_first ? vf{} : load(sum, Whole{});
        const vf exact = __builtin_convertvector(total[r][v], vf);
        store(sum, before + exact * scale * (vf)splat_word(scales + r * t.row_size), Whole{});
      }
    }
    is_first = false;
    ++scales;
    exponents += kPanel;
  }
}

template <int Rows = kPackedRows>
void multiply_some_integers(i64 rows, TileArgs<Int16> t, i64 num_panels, float* sums, i64 stride,
                            bool is_first) {
  if constexpr (Rows > 0) {
    if (rows != Rows) {
      return multiply_some_integers<Rows - 1>(rows, t, num_panels, sums, stride, is_first);
    }
    for (i64 panel = 0; panel < num_panels; ++panel, sums += kPanel) {
      multiply_integers<Rows>(t, sums, stride, is_first);
      t.weight += t.panel_words;
      t.exponents += t.panel_words;
      t.ahead += t.panel_words * 4;
    }
  }
}

inline void multiply_rows(i64 num_rows, const TileArgs<Int16>& t, i64 num_panels, float* sums,
                          i64 stride, bool is_first) {
  multiply_some_integers(num_rows, t, num_panels, sums, stride, is_first);
}

inline void store_integers(std::uint32_t* words, i64 index, vi integers) {
  char* to = reinterpret_cast<char*>(words) + 2 * index;
  store_raw(to, __builtin_convertvector((vu)integers, vh), Whole{});
}

// A block of a row as integers; returns what one of them stands for: no number where something in the
// block is not finite, so that results are none either.
inline float take_values(const bf16* values, std::uint32_t* words) {
  vf most = {}, sums = {};
  for (i64 i = 0; i < kIntegerBlock; i += kLanes) {
    const vf magnitude = (vf)((vu)load(values + i, Whole{}) & 0x7fffffffu);
    most = maximum(most, magnitude);
    sums += magnitude * splat(1.0f / kIntegerBlock);  // they may add up to more than a float
  }
  const float by_most = maximum(most) / kLargestInteger;
  const float by_sum = sum(sums) / (kLargestSum / kIntegerBlock);
  const float scale = by_most > by_sum ? by_most : by_sum;
  const float inverse = scale > kLeast ? 1 / scale : 0;
  for (i64 i = 0; i < kIntegerBlock; i += kLanes) {
    store_integers(words, i, rounded(load(values + i, Whole{}) * splat(inverse)));
  }
  return scale;
}

// body(values): the values of a block, with zeros behind the end of what they are part of.
template <class Body>
inline void with_block(const bf16* from, i64 size, Body body) {
  if (size >= kIntegerBlock) return body(from);
  bf16 values[kIntegerBlock] = {};
  if (size > 0) std::memcpy(values, from, size * sizeof *from);
  body(values);
}

// Of a slab: its words, zeros behind the row's end, and its blocks' scales.
inline void take_row(const bf16* from, i64 num_inputs, i64 slab_words, std::uint32_t* to, Int16) {
  std::uint32_t* scales = to + slab_words;
  for (i64 begin = 0; begin < 2 * slab_words; begin += kIntegerBlock) {
    with_block(from + begin, num_inputs - begin, [&](const bf16* values) {
      const float scale = take_values(values, to + begin / 2);
      std::memcpy(scales++, &scale, sizeof scale);
    });
  }
}

// ---- packing -----------------------------------------------------------------------------------

// A block of one output, zeros behind its end, as integers; returns their exponent, 255 where something
// is not finite.
inline std::uint8_t take_weights(const bf16* values, std::uint32_t* words) {
  vi most = {};
  for (i64 i = 0; i < kIntegerBlock; i += kLanes) {
    const vi magnitude = (vi)load(values + i, Whole{}) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  std::int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = most[lane] > bits ? most[lane] : bits;
  const int above = (bits >> 23) + 1;  // all are below 2 to the power of this, less 127
  const int exponent = above == 256 ? 255 : above > kWeightBits ? above - kWeightBits : 1;
  const std::uint32_t inverse_bits = std::uint32_t(254 - exponent) << 23;
  float inverse;
  std::memcpy(&inverse, &inverse_bits, sizeof inverse);
  for (i64 i = 0; i < kIntegerBlock; i += kLanes) {
    const vi integers = exponent == 255 ? vi{} : rounded(load(values + i, Whole{}) * splat(inverse));
    store_integers(words, i, integers);
  }
  return static_cast<std::uint8_t>(exponent);
}

// Up to 16 rows of a matrix, null where there is none, into a panel.
inline void pack_panel(const bf16* const* rows, i64 num_inputs, std::uint32_t* to, Int16) {
  const i64 num_words = PackedShape<Int16>::num_words(num_inputs);
  const i64 front_words = PackedShape<Int16>::front_words(num_words);
  std::memset(to, 0, front_words * 4);
  auto* exponents = reinterpret_cast<std::uint8_t*>(to);
  to += front_words;
  for (i64 begin = 0; begin < num_inputs; begin += kIntegerBlock, exponents += kPanel) {
    const i64 left = num_inputs - begin, size = left < kIntegerBlock ? left : kIntegerBlock;
    alignas(64) std::uint32_t words[kPanel][kIntegerBlockWords] = {};
    const char* from[kPanel] = {};
    for (i64 i = 0; i < kPanel; ++i) {
      if (!rows[i]) continue;
      with_block(rows[i] + begin, size, [&](const bf16* values) {
        exponents[i] = take_weights(values, words[i]);
      });
      from[i] = reinterpret_cast<const char*>(words[i]);
    }
    transpose_words(from, divide_up(size, 2), to + begin / 2 * kPanel, kPanel);
  }
}

// A row of a table, rounded as it was for the panels.
inline void unpack_row(const std::uint32_t* panel, i64 place, i64 num_inputs, bf16* to, Int16) {
  const i64 num_words = PackedShape<Int16>::num_words(num_inputs);
  const auto* exponents = reinterpret_cast<const std::uint8_t*>(panel) + place;
  panel += PackedShape<Int16>::front_words(num_words);
  for (i64 i = 0; i < num_inputs; ++i) {
    const std::uint32_t word = panel[i / 2 * kPanel + place];
    const auto integer = static_cast<std::int16_t>(i % 2 ? word >> 16 : word & 0xffff);
    const std::uint32_t scale_bits = std::uint32_t(exponents[i / kIntegerBlock * kPanel]) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    const float value = integer * scale;  // 8 bits are enough for it
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to[i].bits = static_cast<std::uint16_t>(bits >> 16);
  }
}
