// Rows times a matrix of int4 or int8 with a scale, and perhaps a zero point, for each group of inputs.
// Included by each level_*.cpp after tiles.h; see there. kernels/layout_names.py defines the layout.
//
// A panel holds 16 outputs; each of its 32-bit words holds what one output has for the next 8 (int4)
// or 4 (int8) inputs, lowest bits first.
//
// Rows of bfloat16 become integers of 16 bits with a scale for each block of at most 128 inputs: 8 bits
// more than the largest of them had. A shift and a mask make pairs of 16 bits of a word's fields, whose
// products with pairs of inputs are added up exactly in 32 bits; z times the sum of the inputs is taken
// off, exactly too, and what is left is scaled.
//
// For rows of fp32 a weight q is put into the top of a float's mantissa, which makes 1 + q / 2^Bits of
// it by a shift, a mask and an or; no conversion. With S the sum of a group's inputs and A the sum of
// inputs times these floats,
//
//     sum of x (q - z) scale  =  2^Bits scale (A - (1 + z / 2^Bits) S)
//
// and S is the same for all outputs. Rows are prepared, and put into the matrix's order, once.

constexpr int kQuantizedRows = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
constexpr i64 kQuantizedAhead = 2048 / 4;  // words: panels are fetched so far ahead
constexpr i64 kQuantizedChunk = 64;  // rows that a piece of the work takes at most

// Panels that are computed at once: a sum is one chain of additions, each of which waits for the last,
// so that few rows need several panels to have enough chains.
constexpr int quantized_panels(int rows) {
  if (LANES == 16) return rows == 1 ? 4 : rows <= 4 ? 2 : 1;
  return LANES == 8 && rows == 1 ? 2 : 1;
}

constexpr int kQuantizedPanels = quantized_panels(1);

// ---- pairs of 16 bits --------------------------------------------------------------------------

constexpr i64 kBlockInputs = 128;  // products of int8 with so many fill 31 bits
constexpr float kLargest = 32767;
constexpr float kNothing = 1e-30f;  // its inverse is still a float

// The blocks of a row: each lies within a group.
struct Blocks {
  i64 group_size, per_group, num_groups, num_inputs;

  explicit Blocks(const QuantizedLinearArgs& a)
      : group_size(a.group_size < a.num_inputs ? a.group_size : a.num_inputs),
        per_group(divide_up(group_size, kBlockInputs)),
        num_groups(divide_up(a.num_inputs, group_size)), num_inputs(a.num_inputs) {}

  i64 count() const { return num_groups * per_group; }

  i64 begin(i64 group, i64 block) const {
    return least(group * group_size + block * kBlockInputs, end_of(group));
  }

  i64 end(i64 group, i64 block) const { return least(begin(group, block) + kBlockInputs, end_of(group)); }

 private:
  static i64 least(i64 a, i64 b) { return a < b ? a : b; }
  i64 end_of(i64 group) const { return least((group + 1) * group_size, num_inputs); }
};

// What a row has of a block.
struct BlockOfRow {
  float scale;
  std::int32_t sum;
};

template <int Bits>
struct Pairs {
  static constexpr int kPerWord = 32 / Bits;
  static constexpr int kSteps = kPerWord / 2;
  static constexpr std::uint32_t kMask = ((1u << Bits) - 1) * 0x10001u;

  // Fields Step and Step + kSteps.
  template <int Step>
  static vu value(vu word) { return (word >> (Bits * Step)) & kMask; }
};

template <int Bits, int Rows, int Panels>
__attribute__((noinline)) void paired_rows(const QuantizedLinearArgs& a, i64 row, i64 panel, float* out,
                                           i64 out_stride) {
  using P = Pairs<Bits>;
  constexpr int kVectors = Panels * kPanelVectors;
  const Blocks blocks(a);
  const i64 num_words = divide_up(a.num_inputs, P::kPerWord), stride = num_words * P::kSteps;
  const i64 panel_words = num_words * kPanel, panel_groups = blocks.num_groups * kPanel;
  const std::uint32_t* words = a.words + panel * panel_words;
  const auto* x = reinterpret_cast<const std::uint32_t*>(a.rows) + row * stride;
  const auto* of_block = reinterpret_cast<const BlockOfRow*>(a.group_sums) + row * blocks.count();
  vf sum[Rows][kVectors] = {};
  for (i64 group = 0; group < blocks.num_groups; ++group) {
    vf scale[kVectors];
    vi zero[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const i64 at = (panel + v / kPanelVectors) * panel_groups + group * kPanel +
                     v % kPanelVectors * kLanes;
      scale[v] = load(a.scales + at, Whole{});
      __builtin_prefetch(a.scales + at + panel_groups, 0, 3);  // the next panel's
      zero[v] = vi{} + (1 << (Bits - 1));
      if (a.zeros) zero[v] = __builtin_convertvector(load(a.zeros + at, Whole{}), vi);
    }
    for (i64 block = 0; block < blocks.per_group; ++block, ++of_block) {
      const i64 first = divide_up(blocks.begin(group, block), P::kPerWord);
      const i64 end = divide_up(blocks.end(group, block), P::kPerWord);
      vi total[Rows][kVectors] = {};
      for (i64 word = first; word < end; ++word, x += P::kSteps) {
        vu held[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const std::uint32_t* from = words + v / kPanelVectors * panel_words + word * kPanel;
          if (v % kPanelVectors == 0) __builtin_prefetch(from + kQuantizedAhead, 0, 3);
          held[v] = load_raw<vu>(from + v % kPanelVectors * kLanes, Whole{});
        }
        unrolled<P::kSteps>([&](auto step) __attribute__((always_inline)) {
          vu weights[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            weights[v] = P::template value<decltype(step)::value>(held[v]);
          }
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const vu inputs = vu{} + x[r * stride + decltype(step)::value];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              add_integers<Rows * kVectors>(total[r][v], weights[v], inputs);
              keep_order(total[r][v]);
            }
          }
        });
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const BlockOfRow& of = of_block[r * blocks.count()];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const vf exact = __builtin_convertvector(total[r][v] - zero[v] * of.sum, vf);
          sum[r][v] += exact * (scale[v] * splat(of.scale));
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v], Whole{});
  }
}

// Values of a block, at most kBlockInputs with zeros behind them, as integers; its scale and their sum.
inline BlockOfRow as_integers(const float* values, std::int32_t* integers) {
  vf most = {}, poison = {};
  for (i64 i = 0; i < kBlockInputs; i += kLanes) {
    const vf v = load(values + i, Whole{});
    most = maximum(most, (vf)((vu)v & 0x7fffffffu));
    poison += v - v;  // nothing, unless something is not finite: then the results must not be either
  }
  const float largest = maximum(most), inverse = largest > kNothing ? kLargest / largest : 0;
  vi sums = {};
  for (i64 i = 0; i < kBlockInputs; i += kLanes) {
    const vi nearest = rounded(load(values + i, Whole{}) * splat(inverse));
    store_raw(integers + i, nearest, Whole{});
    sums += nearest;
  }
  std::int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return {largest / kLargest + sum(poison), total};
}

template <int Bits>
void pair_up(const QuantizedLinearArgs& a, i64 row) {
  using P = Pairs<Bits>;
  const Blocks blocks(a);
  const bf16* from = static_cast<const bf16*>(a.x) + row * a.row_stride;
  auto* to = reinterpret_cast<std::uint32_t*>(a.rows) +
             row * divide_up(a.num_inputs, P::kPerWord) * P::kSteps;
  auto* of_block = reinterpret_cast<BlockOfRow*>(a.group_sums) + row * blocks.count();
  for (i64 group = 0; group < blocks.num_groups; ++group) {
    for (i64 block = 0; block < blocks.per_group; ++block) {
      alignas(64) float values[kBlockInputs] = {};
      alignas(64) std::int32_t integers[kBlockInputs];
      const i64 begin = blocks.begin(group, block), size = blocks.end(group, block) - begin;
      if (a.order) {
        for (i64 i = 0; i < size; ++i) {
          const std::uint32_t bits = std::uint32_t(from[a.order[begin + i]].bits) << 16;
          std::memcpy(values + i, &bits, sizeof bits);
        }
      } else {
        for_lanes(size, [&](i64 i, auto extent) {
          store(values + i, load(from + begin + i, extent), extent);
        });
      }
      *of_block++ = as_integers(values, integers);
      for (i64 i = 0; i < size; i += P::kPerWord) {
        for (i64 step = 0; step < P::kSteps; ++step) {
          const std::uint32_t low = integers[i + step], high = integers[i + step + P::kSteps];
          *to++ = (low & 0xffff) | (high << 16);
        }
      }
    }
  }
}

// ---- fp32 --------------------------------------------------------------------------------------

template <int Bits>
struct Field {
  static constexpr int kPerWord = 32 / Bits;
  static constexpr std::uint32_t kOne = 0x3f800000u;
  static constexpr std::uint32_t kMask = ((1u << Bits) - 1) << (23 - Bits);
  static constexpr float kScale = 1 << Bits;

  template <int Index>
  static vf value(vu word) {
    constexpr int kUp = 23 - Bits - Bits * Index;
    const vu moved = kUp >= 0 ? word << (kUp >= 0 ? kUp : 0) : word >> (kUp < 0 ? -kUp : 0);
    return (vf)((moved & kMask) | kOne);
  }
};

// Some rows against some panels: out[row][16 * panel ...] = what the formula says, all groups added.
template <int Bits, int Rows, int Panels>
__attribute__((noinline)) void quantized_rows(const QuantizedLinearArgs& a, i64 row, i64 panel,
                                              float* out, i64 out_stride) {
  using F = Field<Bits>;
  constexpr int kVectors = Panels * kPanelVectors;
  const i64 num_words = divide_up(a.num_inputs, F::kPerWord), stride = num_words * F::kPerWord;
  const i64 num_groups = divide_up(a.num_inputs, a.group_size);
  const i64 group_words = divide_up(a.group_size, F::kPerWord);
  const i64 panel_words = num_words * kPanel, panel_groups = num_groups * kPanel;
  const std::uint32_t* words = a.words + panel * panel_words;
  const float* x = a.rows + row * stride;
  vf sum[Rows][kVectors] = {};
  for (i64 group = 0; group < num_groups; ++group) {
    vf total[Rows][kVectors] = {};
    const i64 end = (group + 1) * group_words < num_words ? (group + 1) * group_words : num_words;
    for (i64 word = group * group_words; word < end; ++word, x += F::kPerWord) {
      vu held[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const std::uint32_t* from = words + v / kPanelVectors * panel_words + word * kPanel;
        if (v % kPanelVectors == 0) __builtin_prefetch(from + kQuantizedAhead, 0, 3);
        held[v] = load_raw<vu>(from + v % kPanelVectors * kLanes, Whole{});
      }
      unrolled<F::kPerWord>([&](auto index) __attribute__((always_inline)) {
        vf weight[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          weight[v] = F::template value<decltype(index)::value>(held[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const vf left = splat(x[r * stride + decltype(index)::value]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) total[r][v] += left * weight[v];
        }
      });
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const i64 at = (panel + v / kPanelVectors) * panel_groups + group * kPanel +
                     v % kPanelVectors * kLanes;
      const vf zero = a.zeros ? load(a.zeros + at, Whole{}) : splat(F::kScale / 2);
      const vf offset = splat(1) + zero * splat(1 / F::kScale);
      const vf scale = load(a.scales + at, Whole{}) * splat(F::kScale);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vf inputs = splat(a.group_sums[(row + r) * num_groups + group]);
        sum[r][v] += scale * (total[r][v] - offset * inputs);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v], Whole{});
  }
}

// Row by row: floats, in the matrix's order, zeros up to a whole word; and the sum of each group.
inline void take_floats(const QuantizedLinearArgs& a, i64 row) {
  const i64 per_word = 32 / a.bits, stride = round_up(a.num_inputs, per_word);
  const float* from = static_cast<const float*>(a.x) + row * a.row_stride;
  float* to = a.rows + row * stride;
  if (a.order) {
    for (i64 i = 0; i < a.num_inputs; ++i) to[i] = from[a.order[i]];
  } else {
    for_lanes(a.num_inputs, [&](i64 i, auto extent) { store(to + i, load(from + i, extent), extent); });
  }
  for (i64 i = a.num_inputs; i < stride; ++i) to[i] = 0;
  const i64 num_groups = divide_up(a.num_inputs, a.group_size);
  for (i64 group = 0; group < num_groups; ++group) {
    const i64 begin = group * a.group_size;
    const i64 end = begin + a.group_size < a.num_inputs ? begin + a.group_size : a.num_inputs;
    vf sums = {};
    for_lanes(end - begin, [&](i64 i, auto extent) { sums += load(to + begin + i, extent); });
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    a.group_sums[row * num_groups + group] = sum;
  }
}

// ---- pieces of the work ------------------------------------------------------------------------

template <class T, int Bits, int Rows, int Panels>
void rows_by_panels(const QuantizedLinearArgs& a, i64 row, i64 panel, float* out, i64 out_stride) {
  if constexpr (std::is_same_v<T, float>) {
    quantized_rows<Bits, Rows, Panels>(a, row, panel, out, out_stride);
  } else {
    paired_rows<Bits, Rows, Panels>(a, row, panel, out, out_stride);
  }
}

template <class T, int Bits, int Rows = kQuantizedRows>
void some_quantized_rows(i64 rows, const QuantizedLinearArgs& a, i64 row, i64 panel, i64 end,
                         float* out, i64 out_stride) {
  if constexpr (Rows > 0) {
    if (rows != Rows) {
      return some_quantized_rows<T, Bits, Rows - 1>(rows, a, row, panel, end, out, out_stride);
    }
    constexpr int kPanels = std::is_same_v<T, float> ? quantized_panels(Rows) : 1;
    for (; panel + kPanels <= end; panel += kPanels, out += kPanels * kPanel) {
      rows_by_panels<T, Bits, Rows, kPanels>(a, row, panel, out, out_stride);
    }
    for (; panel < end; ++panel, out += kPanel) {
      rows_by_panels<T, Bits, Rows, 1>(a, row, panel, out, out_stride);
    }
  }
}

template <class T, int Bits>
void quantized_piece(const QuantizedLinearArgs& a, i64 panel, i64 first, i64 end) {
  constexpr i64 kOutputs = kQuantizedPanels * kPanel;
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out);
  const i64 output = panel * kPanel, left = a.num_outputs - output;
  const i64 num_panels = divide_up(left < kOutputs ? left : kOutputs, kPanel);
  const i64 num_blocks = divide_up(end - first, kQuantizedRows);
  for (i64 block = 0; block < num_blocks; ++block) {
    const i64 row = first + block * (end - first) / num_blocks;
    const i64 rows = first + (block + 1) * (end - first) / num_blocks - row;
    alignas(64) float sums[kQuantizedRows][kOutputs];
    some_quantized_rows<T, Bits>(rows, a, row, panel, panel + num_panels, sums[0], kOutputs);
    for (i64 r = 0; r < rows; ++r) {
      for_lanes(left < kOutputs ? left : kOutputs, [&](i64 i, auto extent) {
        const vf added = bias ? load(bias + output + i, extent) : vf{};
        store(out + (row + r) * a.num_outputs + output + i, load(sums[r] + i, extent) + added, extent);
      });
    }
  }
}

template <class T>
bool quantized_linear(const QuantizedLinearArgs& a) {
  auto prepare = [&](i64 row) {
    if constexpr (std::is_same_v<T, float>) {
      take_floats(a, row);
    } else if (a.bits == 4) {
      pair_up<4>(a, row);
    } else {
      pair_up<8>(a, row);
    }
  };
  parallel(a.num_rows, grain_for(2 * a.num_inputs), prepare);
  const i64 num_chunks = divide_up(a.num_rows, kQuantizedChunk);
  auto body = [&](i64 piece) {
    const i64 panel = piece / num_chunks * kQuantizedPanels, chunk = piece % num_chunks;
    const i64 first = chunk * a.num_rows / num_chunks, end = (chunk + 1) * a.num_rows / num_chunks;
    if (a.bits == 4) {
      quantized_piece<T, 4>(a, panel, first, end);
    } else {
      quantized_piece<T, 8>(a, panel, first, end);
    }
  };
  const i64 rows = a.num_rows < kQuantizedChunk ? a.num_rows : kQuantizedChunk;
  const i64 num_pieces = divide_up(a.num_outputs, kQuantizedPanels * kPanel) * num_chunks;
  parallel(num_pieces, grain_for(rows * a.num_inputs * kQuantizedPanels), body);
  return true;
}
