// Rows of bf16 times panels of integers of 12 bits: integer_panels.h explains those.
// Included by each level_*.cpp after that.
//
// 128 inputs of a row, a block, become integers of 16 bits with a scale of its own, so small that the
// sum of a block's products is exact in 32 bits: weights are below 2^11, and what a row has of a block
// adds up to 2^20 at most, all as magnitudes. Blocks are added up in floats, one chain.
//
// Of normally distributed numbers the rounding of weights is 0.03 % and of rows 0.003 % (root mean
// square, of theirs); a result's, to bf16, is 0.17 %.
//
// Few rows wait for memory: it is read in order, and unpacked on the way. Many meet a slab of a panel,
// some blocks that were unpacked into the first-level cache.

constexpr float kLargestInteger = 32767;
constexpr float kLargestSum = (1 << 20) - kIntegerBlock / 2;  // rounding adds a half to each
constexpr float kLeast = 1e-37f;  // what is below is nothing: its inverse must still be a float
constexpr i64 kMaxChunkRows = 126;
constexpr i64 kStreamPanels = 2;  // of a piece, for few rows
constexpr i64 kSlabBlocks = 8;    // of a panel, unpacked: about a first-level cache
constexpr int kFusedRows = 2;     // more rows leave no registers to unpack weights in
constexpr i64 kAheadBytes = 72 * kLine;
constexpr i64 kFusedAheadBytes = 36 * kLine;

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

// A row's words, zeros behind its end, and its blocks' scales.
inline void take_row(const bf16* from, i64 num_inputs, i64 num_words, std::uint32_t* to) {
  for (i64 begin = 0; begin < num_inputs; begin += kIntegerBlock) {
    with_block(from + begin, num_inputs - begin, [&](const bf16* values) {
      const float scale = take_values(values, to + begin / 2);
      std::memcpy(to + num_words + begin / kIntegerBlock, &scale, sizeof scale);
    });
  }
}

// How a product is cut up.
struct IntegerPlan {
  using Shape = PackedShape<Int12>;

  i64 num_words, num_blocks;  // of a row
  i64 num_rows, chunk_rows, num_chunks;
  i64 piece_panels, num_pieces;  // of one chunk
  const std::uint32_t* rows = nullptr;

  // `unit` panels must not be parted.
  IntegerPlan(const PackedLinearArgs& a, i64 num_panels, i64 unit)
      : num_words(Shape::num_words(a.num_inputs)), num_blocks(Shape::num_blocks(num_words)),
        num_rows(a.num_rows) {
    num_chunks = divide_up(num_rows, kMaxChunkRows);
    chunk_rows = divide_up(num_rows, num_chunks);
    const i64 wanted = num_panels * num_chunks / (kPiecesPerThread * num_threads());
    const i64 most = num_rows <= kPackedRows ? kStreamPanels : kMaxPiecePanels;
    piece_panels = round_up(wanted < 1 ? 1 : wanted > most ? most : wanted, unit);
    num_pieces = divide_up(num_panels, piece_panels);
  }

  // Of a row: whole blocks of words, then the blocks' scales.
  i64 row_words() const { return num_blocks * kIntegerBlockWords; }
  i64 row_size() const { return row_words() + num_blocks; }
  i64 sums_bytes() const { return chunk_rows * piece_panels * kPanel * 4; }
  // Longer ones are better where few blocks of rows meet them.
  i64 slab_blocks() const { return kSlabBlocks * (num_rows <= kFewBlocks * kPackedRows ? 2 : 1); }
  i64 num_bytes() const { return sums_bytes() + slab_blocks() * kIntegerBlockWords * kLine; }

  // All rows as integers; false when there was no memory.
  bool take_rows(const PackedLinearArgs& a) {
    auto* to = static_cast<std::uint32_t*>(shared_scratch(num_rows * row_size() * 4));
    if (!(rows = to)) return false;
    auto body = [&](i64 row) {
      const auto* from = static_cast<const bf16*>(a.x) + row * a.row_stride;
      take_row(from, a.num_inputs, row_words(), to + row * row_size());
    };
    parallel(num_rows, grain_for(2 * a.num_inputs), body);
    return true;
  }
};

// A word of each of some rows, and of a panel.
struct WordArgs {
  const std::uint32_t* x;
  i64 row_size;
  const std::uint32_t* weight;
  const char* ahead;  // what will be read later, fetched in steps of `ahead_step` bytes per word
  i64 ahead_step;
};

// total[row] += the products of both halves, added: one vector of a panel's word.
template <int Rows>
inline __attribute__((always_inline)) void add_vector(vi (&total)[Rows][kPanelVectors], int vector,
                                                      const WordArgs& at, i64 word, vu right) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const vu left = splat_word(at.x + r * at.row_size + word);
    add_integers<Rows * kPanelVectors>(total[r][vector], left, right);
    keep_order(total[r][vector]);
  }
}

template <int Rows>
inline __attribute__((always_inline)) void add_word(vi (&total)[Rows][kPanelVectors], WordArgs& at) {
  __builtin_prefetch(at.ahead, 0, 3);
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) {
    add_vector(total, v, at, 0, load_raw<vu>(at.weight + v * kLanes, Whole{}));
  }
  ++at.x;
  at.weight += kPanel;
  at.ahead += at.ahead_step;
}

// total = the sums of some words, an even number and at most a block's, a line each.
template <int Rows>
inline __attribute__((always_inline)) void add_words(vi (&total)[Rows][kPanelVectors], WordArgs at,
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
#define PILOTLIGHT_ADD_WORDS(rows)                                                                   \
  inline __attribute__((always_inline)) void add_words(vi (&total)[rows][2], WordArgs at,            \
                                                       i64 num_words) {                              \
    const std::uint32_t* x3 = at.x + 3 * at.row_size;                                                \
    i64 num_pairs = num_words / 2;                                                                   \
    asm volatile(PILOTLIGHT_ROWS_##rows(PILOTLIGHT_CLEAR)                                            \
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
                 "jne 1b\n\t"                                                                        \
                 PILOTLIGHT_ROWS_##rows(PILOTLIGHT_STORE)                                            \
                 : [weight] "+r"(at.weight), [x] "+r"(at.x), [x3] "+r"(x3), [ahead] "+r"(at.ahead),  \
                   [pairs] "+r"(num_pairs)                                                           \
                 : [row] "r"(at.row_size * 4), [step] "r"(at.ahead_step), [total] "r"(&total)        \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",   \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");            \
  }

PILOTLIGHT_ADD_WORDS(1)
PILOTLIGHT_ADD_WORDS(2)
PILOTLIGHT_ADD_WORDS(3)
PILOTLIGHT_ADD_WORDS(4)
PILOTLIGHT_ADD_WORDS(5)
PILOTLIGHT_ADD_WORDS(6)

#endif

// The same of words in quads.
template <int Rows>
inline __attribute__((always_inline)) void add_quads(vi (&total)[Rows][kPanelVectors], WordArgs at,
                                                     i64 num_words) {
  std::memset(total, 0, sizeof total);
  for (; num_words > 0; num_words -= kQuad) {
#pragma GCC unroll 3
    for (int line = 0; line < kQuadLines; ++line) __builtin_prefetch(at.ahead + line * kLine, 0, 3);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      vu right[kQuad];
      unpack_quad(at.weight + v * kLanes, right);
#pragma GCC unroll 4
      for (int k = 0; k < kQuad; ++k) add_vector(total, v, at, k, right[k]);
    }
    at.x += kQuad;
    at.weight += kQuadLines * kPanel;
    at.ahead += kQuad * at.ahead_step;
  }
}

// Of two, by their exponents as floats have them.
inline vf powers(const std::uint8_t* exponents) {
  const vub bytes = load_raw<vub>(exponents, Whole{});
#if LANES == 8 && defined(__AVX2__)  // GCC takes the other way apart
  return (vf)((vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)) << 23);
#else
  return (vf)(__builtin_convertvector(bytes, vu) << 23);
#endif
}

// A block of some rows and of a panel.
struct BlockArgs {
  WordArgs words;
  const std::uint32_t* scales;    // of rows
  const std::uint8_t* exponents;  // of outputs
  float* sums;                    // [row][0 ... 15]
  i64 stride;
  bool is_first;  // else sums are added to what is there
};

template <int Rows>
inline __attribute__((always_inline)) void add_block(const vi (&total)[Rows][kPanelVectors],
                                                     const BlockArgs& t) {
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) {
    const vf scale = powers(t.exponents + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      float* sum = t.sums + r * t.stride + v * kLanes;
      const vf before = t.is_first ? vf{} : load(sum, Whole{});
      const vf exact = __builtin_convertvector(total[r][v], vf);
      store(sum, before + exact * scale * (vf)splat_word(t.scales + r * t.words.row_size), Whole{});
    }
  }
}

// total = the sums of a block; from quads too, by way of `lines` where there are many rows.
template <int Rows, bool InQuads>
inline __attribute__((always_inline)) void multiply_block(vi (&total)[Rows][kPanelVectors], WordArgs at,
                                                          i64 num_words, std::uint32_t* lines) {
  if constexpr (InQuads && Rows <= kFusedRows) return add_quads(total, at, num_words);
  if constexpr (InQuads) {
    unpack_words(at.weight, num_words, lines);
    at.weight = lines;
  }
  add_words(total, at, num_words);
}

// Some blocks of a panel, from `t` on.
template <int Rows, bool InQuads>
__attribute__((noinline)) void multiply_panel(BlockArgs t, i64 num_words) {
  constexpr i64 kBlockBytes = kIntegerBlockWords * (InQuads ? PackedShape<Int12>::kWordBytes : kLine);
  alignas(64) std::uint32_t lines[InQuads && Rows > kFusedRows ? kIntegerBlockWords * kPanel : 1];
  for (; num_words > 0; num_words -= kIntegerBlockWords) {
    vi total[Rows][kPanelVectors];
    const i64 size = num_words < kIntegerBlockWords ? num_words : kIntegerBlockWords;
    multiply_block<Rows, InQuads>(total, t.words, size, lines);
    add_block(total, t);
    t.is_first = false;
    t.words.x += kIntegerBlockWords;
    t.words.weight += kBlockBytes / 4;
    t.words.ahead += kIntegerBlockWords * t.words.ahead_step;
    ++t.scales;
    t.exponents += kPanel;
  }
}

// body(the number as a constant), for one of 1 ... Most.
template <int Most, class Body>
inline void with_number(i64 number, Body body) {
  if constexpr (Most > 0) {
    if (number == Most) return body(std::integral_constant<int, Most>());
    with_number<Most - 1>(number, body);
  }
}

// One thread's share of a product: takes pieces until none is left.
class IntegerWorker {
 public:
  IntegerWorker(const PackedLinearArgs& a, const IntegerPlan& plan, i64 num_panels, char* memory)
      : plan_(plan), weight_(static_cast<const std::uint32_t*>(a.weight)), num_panels_(num_panels),
        front_words_(Shape::front_words(plan.num_words)),
        panel_words_(Shape::panel_words(plan.num_words)),
        sums_(reinterpret_cast<float*>(memory)),
        lines_(reinterpret_cast<std::uint32_t*>(memory + plan.sums_bytes())) {}

  // Calls emit(row, panel, number of panels, sums) for every row of the piece.
  template <class Emit>
  void run(i64 index, Emit emit) {
    const i64 chunk = index / plan_.num_pieces, row = chunk * plan_.chunk_rows;
    const i64 panel = index % plan_.num_pieces * plan_.piece_panels;
    const i64 rows_left = plan_.num_rows - row, panels_left = num_panels_ - panel;
    const i64 rows = rows_left < plan_.chunk_rows ? rows_left : plan_.chunk_rows;
    const i64 panels = panels_left < plan_.piece_panels ? panels_left : plan_.piece_panels;
    const std::uint32_t* x = plan_.rows + row * plan_.row_size();
    for (i64 p = 0; p < panels; ++p) {
      if (rows <= kPackedRows) {
        multiply_few(x, rows, panel + p, sums_ + p * kPanel);
      } else {
        multiply_many(x, rows, panel + p, sums_ + p * kPanel);
      }
    }
    for (i64 r = 0; r < rows; ++r) emit(row + r, panel, panels, sums_ + r * stride());
  }

 private:
  using Shape = PackedShape<Int12>;
  static constexpr i64 kBlockBytes = kIntegerBlockWords * Shape::kWordBytes;

  i64 stride() const { return plan_.piece_panels * kPanel; }

  const std::uint32_t* panel_at(i64 panel) const { return weight_ + panel * panel_words_; }

  const std::uint32_t* words_at(i64 panel, i64 block) const {
    return panel_at(panel) + front_words_ + block * kBlockBytes / 4;
  }

  const std::uint8_t* exponents(i64 panel, i64 block) const {
    return reinterpret_cast<const std::uint8_t*>(panel_at(panel)) + block * kPanel;
  }

  // As many as there are registers for: memory is read in order, and fetched some lines ahead.
  void multiply_few(const std::uint32_t* x, i64 num_rows, i64 panel, float* sums) {
    const std::uint32_t* weight = words_at(panel, 0);
    const char* ahead = reinterpret_cast<const char*>(weight) +
                        (num_rows <= kFusedRows ? kFusedAheadBytes : kAheadBytes);
    // Between what the panel before has fetched and what the first word fetches lies a front.
    for (i64 back = front_words_ * 4; back > 0; back -= kLine) __builtin_prefetch(ahead - back, 0, 3);
    const WordArgs words = {x, plan_.row_size(), weight, ahead, Shape::kWordBytes};
    multiply<true>(num_rows, words, panel, 0, plan_.num_words, sums);
  }

  // Some blocks after the other, which all rows meet.
  void multiply_many(const std::uint32_t* x, i64 num_rows, i64 panel, float* sums) {
    const i64 slab_blocks = plan_.slab_blocks();
    for (i64 block = 0; block < plan_.num_blocks; block += slab_blocks) {
      const i64 left = plan_.num_words - block * kIntegerBlockWords;
      const i64 most = slab_blocks * kIntegerBlockWords, num_words = left < most ? left : most;
      unpack_words(words_at(panel, block), num_words, lines_);
      const std::uint32_t* next =
          left <= most ? words_at(panel + 1, 0) : words_at(panel, block + slab_blocks);
      multiply_slab(x, num_rows, panel, block, num_words, next, sums);
    }
  }

  // Nearly equal blocks of rows, which fetch a share each of what comes next.
  void multiply_slab(const std::uint32_t* x, i64 num_rows, i64 panel, i64 block, i64 num_words,
                     const std::uint32_t* next, float* sums) {
    const i64 num_shares = divide_up(num_rows, kPackedRows);
    const i64 step = divide_up(Shape::kWordBytes, num_shares);
    for (i64 share = 0; share < num_shares; ++share) {
      const i64 row = share * num_rows / num_shares;
      const char* ahead = reinterpret_cast<const char*>(next) +
                          share * num_words * Shape::kWordBytes / num_shares;
      const WordArgs words = {x + row * plan_.row_size() + block * kIntegerBlockWords,
                              plan_.row_size(), lines_, ahead, step};
      multiply<false>((share + 1) * num_rows / num_shares - row, words, panel, block, num_words,
                      sums + row * stride());
    }
  }

  // Rows times some blocks of a panel, from `block` on.
  template <bool InQuads>
  void multiply(i64 num_rows, const WordArgs& words, i64 panel, i64 block, i64 num_words, float* sums) {
    const std::uint32_t* scales = words.x - block * kIntegerBlockWords + plan_.row_words() + block;
    const BlockArgs args = {words, scales, exponents(panel, block), sums, stride(), block == 0};
    with_number<kPackedRows>(num_rows, [&](auto rows) {
      multiply_panel<rows, InQuads>(args, num_words);
    });
  }

  const IntegerPlan& plan_;
  const std::uint32_t* weight_;
  const i64 num_panels_, front_words_, panel_words_;
  float* sums_;
  std::uint32_t* lines_;  // a slab of a panel, unpacked
};
