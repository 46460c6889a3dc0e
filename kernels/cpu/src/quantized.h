// Rows times a matrix of int4 or int8 with a scale, and perhaps a zero point, for each group of inputs.
// Included by each level_*.cpp after tiles.h; see there. kernels/layout_names.py defines the layout.
//
// A panel holds 16 outputs; each of its 32-bit words holds what one output has for the next 8 (int4)
// or 4 (int8) inputs, lowest bits first. A weight q is put into the top of a float's mantissa, which
// makes 1 + q / 2^Bits of it by a shift, a mask and an or; no conversion. With S the sum of a group's
// inputs and A the sum of inputs times these floats,
//
//     sum of x (q - z) scale  =  2^Bits scale (A - (1 + z / 2^Bits) S)
//
// and S is the same for all outputs. Rows are widened, and put into the matrix's order, once.

constexpr int kQuantizedRows = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
constexpr i64 kQuantizedChunk = 64;  // rows that a piece of the work takes at most

// Panels that are computed at once: a sum is one chain of additions, each of which waits for the last,
// so that few rows need several panels to have enough chains.
constexpr int quantized_panels(int rows) {
  if (LANES == 16) return rows == 1 ? 4 : rows <= 4 ? 2 : 1;
  return LANES == 8 && rows == 1 ? 2 : 1;
}

constexpr int kQuantizedPanels = quantized_panels(1);

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

template <int Bits, int Rows = kQuantizedRows>
void some_quantized_rows(i64 rows, const QuantizedLinearArgs& a, i64 row, i64 panel, i64 end,
                         float* out, i64 out_stride) {
  if constexpr (Rows > 0) {
    if (rows != Rows) {
      return some_quantized_rows<Bits, Rows - 1>(rows, a, row, panel, end, out, out_stride);
    }
    constexpr int kPanels = quantized_panels(Rows);
    for (; panel + kPanels <= end; panel += kPanels, out += kPanels * kPanel) {
      quantized_rows<Bits, Rows, kPanels>(a, row, panel, out, out_stride);
    }
    for (; panel < end; ++panel, out += kPanel) {
      quantized_rows<Bits, Rows, 1>(a, row, panel, out, out_stride);
    }
  }
}

// Row by row: floats, in the matrix's order, zeros up to a whole word; and the sum of each group.
template <class T>
void widen_for_groups(const QuantizedLinearArgs& a, i64 row) {
  const i64 per_word = 32 / a.bits, stride = round_up(a.num_inputs, per_word);
  const T* from = static_cast<const T*>(a.x) + row * a.row_stride;
  float* to = a.rows + row * stride;
  if (a.order) {
    for (i64 i = 0; i < a.num_inputs; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        to[i] = from[a.order[i]];
      } else {
        const std::uint32_t bits = std::uint32_t(from[a.order[i]].bits) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
      }
    }
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
    some_quantized_rows<Bits>(rows, a, row, panel, panel + num_panels, sums[0], kOutputs);
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
  auto widen = [&](i64 row) { widen_for_groups<T>(a, row); };
  parallel(a.num_rows, grain_for(2 * a.num_inputs), widen);
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
