// Weights of bf16 as integers of 12 bits, for levels that multiply pairs of integers but not of bf16.
// Included by each level_*.cpp after packed.h; see there. kernels/layout_names.py defines the layout,
// panel16-int12, kernels/layouts.py how weights become integers. Knows no products.
//
// A panel begins with whole lines that hold, for each block of 128 inputs and each output, the exponent
// of the power of two that multiplies its weights; then come words, pairs of integers, a line for the
// 16 outputs. Four lines lie in the room of three: the halves of words in the first three have 12 bits
// of their own above 4 of the fourth's.

struct Int12 {};

constexpr i64 kIntegerBlock = 128;  // inputs
constexpr i64 kIntegerBlockWords = kIntegerBlock / 2;
constexpr i64 kQuad = 4;         // words that lie together
constexpr i64 kQuadLines = 3;    // in so many lines
constexpr int kWeightBits = 11;  // of a magnitude

typedef std::int16_t vp __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t vup __attribute__((vector_size(4 * LANES)));

template <>
struct Storage<Int12> {
  using Value = bf16;
};

template <>
struct PackedShape<Int12> {
  static constexpr i64 kWordBytes = kLine * kQuadLines / kQuad;  // of a panel

  static i64 num_words(i64 num_inputs) { return round_up(divide_up(num_inputs, 2), kQuad); }
  static i64 num_blocks(i64 num_words) { return divide_up(num_words, kIntegerBlockWords); }
  // Of a panel, before its words.
  static i64 front_words(i64 num_words) {
    return round_up(num_blocks(num_words) * kPanel, kLine) / 4;
  }
  static i64 panel_words(i64 num_words) { return front_words(num_words) + num_words * kWordBytes / 4; }
};

// A vector of each of the four words, from one of each of their three lines.
inline __attribute__((always_inline)) void unpack_quad(const std::uint32_t* from, vu (&to)[kQuad]) {
  const vp first = load_raw<vp>(from, Whole{});
  const vp second = load_raw<vp>(from + kPanel, Whole{});
  const vp third = load_raw<vp>(from + 2 * kPanel, Whole{});
  to[0] = (vu)(first >> 4);
  to[1] = (vu)(second >> 4);
  to[2] = (vu)(third >> 4);
  const vup low = (vup)third << 12 >> 4 | (vup)second << 12;
  to[3] = (vu)((vp)(low >> 4 | (vup)first << 12) >> 4);
}

inline void pack_quad(const std::uint32_t* from, std::uint32_t* to) {
  for (i64 i = 0; i < kPanel; i += kLanes) {
    const vup last = load_raw<vup>(from + 3 * kPanel + i, Whole{});
    for (int line = 0; line < kQuadLines; ++line) {
      const vup own = load_raw<vup>(from + line * kPanel + i, Whole{});
      store_raw(to + line * kPanel + i, own << 4 | (last >> (8 - 4 * line) & 15), Whole{});
    }
  }
}

// num_words, a multiple of kQuad, of a panel: a line each.
inline void unpack_words(const std::uint32_t* from, i64 num_words, std::uint32_t* to) {
  for (i64 word = 0; word < num_words; word += kQuad) {
    for (i64 i = 0; i < kPanel; i += kLanes) {
      vu words[kQuad];
      unpack_quad(from + i, words);
      for (int k = 0; k < kQuad; ++k) store_raw(to + k * kPanel + i, words[k], Whole{});
    }
    from += kQuadLines * kPanel;
    to += kQuad * kPanel;
  }
}

inline void store_integers(std::uint32_t* words, i64 index, vi integers) {
  char* to = reinterpret_cast<char*>(words) + 2 * index;
  store_raw(to, halves_of(integers), Whole{});
}

// body(values): the values of a block, with zeros behind the end of what they are part of.
template <class Body>
inline void with_block(const bf16* from, i64 size, Body body) {
  if (size >= kIntegerBlock) return body(from);
  bf16 values[kIntegerBlock] = {};
  if (size > 0) std::memcpy(values, from, size * sizeof *from);
  body(values);
}

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
inline void pack_panel(const bf16* const* rows, i64 num_inputs, std::uint32_t* to, Int12) {
  const i64 num_words = PackedShape<Int12>::num_words(num_inputs);
  const i64 front_words = PackedShape<Int12>::front_words(num_words);
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
    const i64 num_block_words = PackedShape<Int12>::num_words(size);
    alignas(64) std::uint32_t lines[kIntegerBlockWords * kPanel];
    transpose_words(from, num_block_words, lines, kPanel);
    for (i64 word = 0; word < num_block_words; word += kQuad, to += kQuadLines * kPanel) {
      pack_quad(lines + word * kPanel, to);
    }
  }
}

// One weight of one output, as `panel`'s words have it.
inline int integer_at(const std::uint32_t* panel, i64 place, i64 input) {
  const i64 word = input / 2;
  const auto* lines = reinterpret_cast<const std::uint16_t*>(panel + word / kQuad * kQuadLines * kPanel);
  const auto half = [&](i64 line) { return lines[line * 2 * kPanel + 2 * place + input % 2]; };
  const i64 line = word % kQuad;
  const int last = (half(0) & 15) << 12 | (half(1) & 15) << 8 | (half(2) & 15) << 4;
  return static_cast<std::int16_t>(line < kQuadLines ? half(line) : last) >> 4;
}

// A row of a table, rounded as it was for the panels.
inline void unpack_row(const std::uint32_t* panel, i64 place, i64 num_inputs, bf16* to, Int12) {
  const i64 num_words = PackedShape<Int12>::num_words(num_inputs);
  const auto* exponents = reinterpret_cast<const std::uint8_t*>(panel) + place;
  panel += PackedShape<Int12>::front_words(num_words);
  for (i64 i = 0; i < num_inputs; ++i) {
    const std::uint32_t scale_bits = std::uint32_t(exponents[i / kIntegerBlock * kPanel]) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    const float value = integer_at(panel, place, i) * scale;  // 8 bits are enough for it
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to[i].bits = static_cast<std::uint16_t>(bits >> 16);
  }
}
