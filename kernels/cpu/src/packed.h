// Rows times a packed weight matrix; packing one; rows of a packed table.
// Included by each level_*.cpp after tiles.h; see there. kernels/layouts.py defines the layout.
//
// A panel holds 16 outputs: for each word along the summed dimension, the 16 outputs' words lie side
// by side, so a panel is read once, in order, and nothing is summed across lanes. A word is one float
// or two neighbouring bf16; where no instruction multiplies pairs of bf16, its halves become floats by
// a shift and a mask, and the rows are widened once for the whole matrix.
//
// Every sum is one chain along the summed dimension, whatever the number of rows or threads: a row's
// result depends on nothing else in the batch.

constexpr i64 kPanel = 16;
constexpr int kPanelVectors = kPanel / LANES;
constexpr int kSumVectors = LANES == 16 ? 24 : 12;  // registers for sums
constexpr int kPackedRows = 6;
constexpr int kMaxPanels = 4;
constexpr i64 kRowChunkBytes = 256 << 10;  // rows that stay in the second-level cache
constexpr i64 kPiecePanels = 4;

// What a row is read as: words for pairs of bf16, else floats.
template <class T>
using RowElement = std::conditional_t<Words<T>::kPairs, std::uint32_t, float>;

constexpr int panels_for(int rows) {
  const int most = kSumVectors / (rows * kPanelVectors);
  return most < 1 ? 1 : most > kMaxPanels ? kMaxPanels : most;
}

template <class T>
struct PackedShape {
  // Weights per 32-bit word.
  static constexpr i64 kPerWord = 4 / sizeof(T);

  static i64 num_words(i64 num_inputs) { return (num_inputs + kPerWord - 1) / kPerWord; }
  static i64 panel_words(i64 num_inputs) { return num_words(num_inputs) * kPanel; }
  // Elements of one row as the kernels read it.
  static i64 row_size(i64 num_inputs) {
    return Words<T>::kPairs ? num_words(num_inputs) : num_words(num_inputs) * kPerWord;
  }
};

inline vf splat_at(const float* from) { return splat(*from); }

// Sums of Rows rows with Panels panels into out[row][panel * kPanel ...].
template <class T, int Rows, int Panels>
void multiply_panels(const RowElement<T>* x, i64 row_size, const std::uint32_t* weight,
                     i64 panel_words, i64 num_words, float* out) {
  constexpr int kVectors = Panels * kPanelVectors;
  vf total[Rows][kVectors] = {};
  const auto word_at = [&](i64 word, int v) __attribute__((always_inline)) {
    const int panel = v / kPanelVectors, part = v % kPanelVectors;
    return load_raw<vu>(weight + panel * panel_words + word * kPanel + part * kLanes, Whole{});
  };
  // One row element against one vector of each panel.
  const auto add = [&](i64 element, auto weights_of) __attribute__((always_inline)) {
    vf right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) right[v] = weights_of(v);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const vf left = splat_at(reinterpret_cast<const float*>(x) + r * row_size + element);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) total[r][v] += left * right[v];
    }
  };
  for (i64 word = 0; word < num_words; ++word) {
    // A panel's stream runs on into the next one: the hardware's own reach is a page.
    if constexpr (Rows <= 2) {
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        __builtin_prefetch(weight + p * panel_words + (word + 32) * kPanel, 0, 3);
      }
    }
    if constexpr (Words<T>::kPairs) {
      vu right[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) right[v] = word_at(word, v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vu left = splat_word(reinterpret_cast<const std::uint32_t*>(x) + r * row_size + word);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          total[r][v] = multiply_add<true>(total[r][v], left, right[v]);
        }
      }
    } else if constexpr (sizeof(T) == 2) {
      add(2 * word, [&](int v) { return (vf)(word_at(word, v) << 16); });
      add(2 * word + 1, [&](int v) { return (vf)(word_at(word, v) & 0xffff0000u); });
    } else {
      add(word, [&](int v) { return (vf)word_at(word, v); });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      store(out + r * Panels * kPanel + v * kLanes, total[r][v], Whole{});
    }
  }
}

// A run of panels against a block of rows; what a tile of sums becomes is the caller's business.
template <class T>
struct PackedRun {
  const RowElement<T>* x;
  i64 row_size, panel_words, num_words;
  const std::uint32_t* weight;

  // Calls emit(row, panel, sums, stride) for every row and panel.
  template <int Rows, int Panels, class Emit>
  void tile(i64 row, i64 panel, Emit emit) const {
    alignas(64) float sums[Rows * Panels * kPanel];
    multiply_panels<T, Rows, Panels>(x + row * row_size, row_size, weight + panel * panel_words,
                                     panel_words, num_words, sums);
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) {
        emit(row + r, panel + p, sums + (r * Panels + p) * kPanel);
      }
    }
  }

  template <int Rows, class Emit>
  void rows(i64 row, i64 panel, i64 end_panel, Emit emit) const {
    constexpr int kPanels = panels_for(Rows);
    for (; panel + kPanels <= end_panel; panel += kPanels) tile<Rows, kPanels>(row, panel, emit);
    for (; panel < end_panel; ++panel) tile<Rows, 1>(row, panel, emit);
  }

  template <class Emit, int Rows = kPackedRows>
  void some_rows(i64 row, i64 num_rows, i64 panel, i64 end_panel, Emit emit) const {
    if constexpr (Rows > 0) {
      if (num_rows == Rows) return rows<Rows>(row, panel, end_panel, emit);
      some_rows<Emit, Rows - 1>(row, num_rows, panel, end_panel, emit);
    }
  }

  // Rows [row, end_row) x panels [panel, end_panel), blocks of nearly equal numbers of rows. A block
  // of rows meets `unit` panels before the next block does.
  template <class Emit>
  void block(i64 row, i64 end_row, i64 panel, i64 end_panel, i64 unit, Emit emit) const {
    const i64 num_rows = end_row - row;
    const i64 num_blocks = (num_rows + kPackedRows - 1) / kPackedRows;
    // Few panels at a time: they stay in the cache for all blocks of rows.
    const i64 step = num_blocks == 1 ? end_panel - panel : unit;
    for (; panel < end_panel; panel += step) {
      for (i64 b = 0; b < num_blocks; ++b) {
        const i64 first = row + b * num_rows / num_blocks;
        const i64 last = row + (b + 1) * num_rows / num_blocks;
        some_rows(first, last - first, panel, panel + step, emit);
      }
    }
  }
};

// One row as multiply_panels reads it; what is past its end is zero.
template <class T>
void widen_row(const T* from, i64 num_inputs, RowElement<T>* to) {
  const i64 size = PackedShape<T>::row_size(num_inputs);
  if constexpr (Words<T>::kPairs) {
    to[size - 1] = 0;
    std::memcpy(to, from, num_inputs * sizeof(T));
  } else {
    for (i64 i = num_inputs; i < size; ++i) to[i] = 0;
    for_lanes(num_inputs, [&](i64 i, auto extent) { store(to + i, load(from + i, extent), extent); });
  }
}

template <class T>
RowElement<T>* widened_rows(const PackedLinearArgs& a) {
  const i64 size = PackedShape<T>::row_size(a.num_inputs);
  auto* rows = static_cast<RowElement<T>*>(scratch(a.num_rows * size * 4));
  if (!rows) return nullptr;
  auto body = [&](i64 r) {
    widen_row(static_cast<const T*>(a.x) + r * a.row_stride, a.num_inputs, rows + r * size);
  };
  parallel(a.num_rows, grain_for(a.num_inputs), body);
  return rows;
}

// All tiles of the product. A piece is some panels for a chunk of rows; `unit` panels stay together.
template <class T, class Emit>
bool packed_product(const PackedLinearArgs& a, i64 num_panels, i64 unit, Emit emit) {
  using Shape = PackedShape<T>;
  if (a.num_rows == 0) return true;
  const RowElement<T>* x = widened_rows<T>(a);
  if (!x) return false;
  const i64 row_size = Shape::row_size(a.num_inputs);
  const PackedRun<T> run = {x, row_size, Shape::panel_words(a.num_inputs),
                            Shape::num_words(a.num_inputs),
                            static_cast<const std::uint32_t*>(a.weight)};
  const i64 fitting = kRowChunkBytes / (row_size * 4) / kPackedRows * kPackedRows;
  const i64 chunk = fitting < kPackedRows ? kPackedRows : fitting;
  const i64 num_chunks = (a.num_rows + chunk - 1) / chunk;
  const i64 piece = kPiecePanels * unit;
  const i64 num_pieces = (num_panels + piece - 1) / piece;
  auto body = [&](i64 index) {
    // Neighbouring pieces share the rows, which are the larger of the two for long prompts.
    const i64 c = index / num_pieces, p = index % num_pieces;
    const i64 first = c * a.num_rows / num_chunks, last = (c + 1) * a.num_rows / num_chunks;
    const i64 panel = p * piece, end = panel + piece < num_panels ? panel + piece : num_panels;
    run.block(first, last, panel, end, unit, emit);
  };
  parallel(num_chunks * num_pieces, 1, body);
  return true;
}

template <class T>
bool packed_linear(const PackedLinearArgs& a) {
  const T* bias = static_cast<const T*>(a.bias);
  const auto emit = [&](i64 row, i64 panel, const float* sums) __attribute__((always_inline)) {
    const i64 output = panel * kPanel;
    const i64 left = a.num_outputs - output;
    T* out = static_cast<T*>(a.out) + row * a.num_outputs + output;
    for_lanes(left < kPanel ? left : kPanel, [&](i64 i, auto extent) {
      const vf added = bias ? load(bias + output + i, extent) : vf{};
      store(out + i, load(sums + i, extent) + added, extent);
    });
  };
  return packed_product<T>(a, (a.num_outputs + kPanel - 1) / kPanel, 1, emit);
}

// Panels of gate and up in turn; num_outputs counts one of them and is a multiple of kPanel.
template <class T>
bool packed_gate_up(const PackedLinearArgs& a) {
  struct Half {
    float gate[kPackedRows][kPanel];
  };
  thread_local Half half;
  const auto emit = [&](i64 row, i64 panel, const float* sums) {
    float* gate = half.gate[row % kPackedRows];
    if (panel % 2 == 0) {
      std::memcpy(gate, sums, sizeof half.gate[0]);
      return;
    }
    T* out = static_cast<T*>(a.out) + row * a.num_outputs + panel / 2 * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      const vf g = load(gate + i, Whole{});
      const vf activated = g / (splat(1.0f) + exp(-g));
      store(out + i, activated * load(sums + i, Whole{}), Whole{});
    }
  };
  return packed_product<T>(a, 2 * a.num_outputs / kPanel, 2, emit);
}

// 32-bit words of up to 16 rows side by side: to[word][row]. Null rows become zeros.
inline void transpose_words(const char* const* rows, i64 num_words, std::uint32_t* to) {
  for (i64 row = 0; row < kPanel; row += kLanes) {
    for_lanes(num_words, [&](i64 word, auto extent) {
      vu block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const char* from = rows[row + i];
        block[i] = from ? load_raw<vu>(from + word * 4, extent) : vu{};
      }
      transpose(block);
      const i64 left = num_words - word;
      for (int i = 0; i < kLanes && i < left; ++i) {
        store_raw(to + (word + i) * kPanel + row, block[i], Whole{});
      }
    });
  }
}

// Rows of one or, in turn by panels, two matrices [num_outputs, num_inputs] into panels.
template <class T>
bool pack_panels(const PackArgs& a) {
  using Shape = PackedShape<T>;
  const i64 num_whole = a.num_inputs / Shape::kPerWord, num_words = Shape::num_words(a.num_inputs);
  const i64 num_matrices = a.second ? 2 : 1;
  const i64 num_panels = (a.num_outputs + kPanel - 1) / kPanel * num_matrices;
  auto body = [&](i64 panel) {
    const bool is_second = a.second && panel % 2 == 1;
    const T* from = static_cast<const T*>(is_second ? a.second : a.first);
    auto* to = static_cast<std::uint32_t*>(a.out) + panel * num_words * kPanel;
    const char* rows[kPanel];
    for (i64 i = 0; i < kPanel; ++i) {
      const i64 output = panel / num_matrices * kPanel + i;
      const T* row = output < a.num_outputs ? from + output * a.num_inputs : nullptr;
      rows[i] = reinterpret_cast<const char*>(row);
    }
    transpose_words(rows, num_whole, to);
    // An odd last bf16 is a word with an empty half.
    for (i64 i = 0; i < kPanel && num_whole < num_words; ++i) {
      std::uint32_t bits = 0;
      if (rows[i]) std::memcpy(&bits, rows[i] + num_whole * 4, sizeof(T));
      to[num_whole * kPanel + i] = bits;
    }
  };
  parallel(num_panels, grain_for(num_words * kPanel), body);
  return true;
}

template <class T>
bool packed_embedding(const PackedEmbeddingArgs& a) {
  using Shape = PackedShape<T>;
  const i64 num_words = Shape::num_words(a.num_inputs);
  auto body = [&](i64 row) {
    const i64 id = a.token_ids[row];
    const auto* from = static_cast<const std::uint32_t*>(a.weight) +
                       id / kPanel * num_words * kPanel + id % kPanel;
    char* to = static_cast<char*>(a.out) + row * a.num_inputs * sizeof(T);
    for (i64 word = 0; word < num_words; ++word) {
      const i64 left = (a.num_inputs - word * Shape::kPerWord) * i64{sizeof(T)};
      std::memcpy(to + word * 4, from + word * kPanel, left < 4 ? left : 4);
    }
  };
  parallel(a.num_rows, grain_for(8 * num_words), body);
  return true;
}
