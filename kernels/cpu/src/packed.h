// Rows times a packed weight matrix.
// Included by each level_*.cpp after tiles.h; see there. kernels/layouts.py defines the layout.
//
// A panel holds 16 outputs: for each word along the summed dimension, the 16 outputs' words lie side
// by side, so a panel is read once, in order, and nothing is summed across lanes. A word is one float
// or two neighbouring bf16; where no instruction multiplies pairs of bf16, its halves become floats
// by a shift and a mask, and the rows are widened.
//
// The work is cut into pieces, some panels for a chunk of rows, that threads take as they come. For
// more rows than the registers hold, the summed dimension is cut into slabs: the rows' slab stays in
// the second-level cache, a panel's in the first, and sums are put down in between.
//
// With the matrix unit, pairs of bf16 are multiplied there: packed_tiles.h. Pairs of integers:
// packed_integers.h.
//
// Every sum is one chain along the summed dimension, whatever the number of rows or threads: a row's
// result depends on nothing else in the batch.

constexpr i64 kPanel = 16;
constexpr int kPanelVectors = kPanel / LANES;
constexpr int kSumVectors = LANES == 16 ? 24 : 12;  // registers for sums
constexpr int kPackedRows = LANES == 4 ? 3 : 6;
constexpr int kMaxPanels = 4;
constexpr i64 kSlabWords = 512;           // of a panel: about a first-level cache
constexpr i64 kRowSlabBytes = 256 << 10;  // of the rows: what a second-level cache can spare
constexpr i64 kKeptBytes = 2 << 20;       // of all slabs of the rows: what a third-level cache can spare
constexpr i64 kFewBlocks = 4;             // of rows, for which longer slabs are better
constexpr i64 kMaxPiecePanels = 16;
constexpr i64 kStreamRows = LANES == 16 ? 6 : 3;  // fewer wait for memory, not for multiplications
constexpr i64 kPiecesPerThread = 8;  // the last ones are what a thread may wait for

// Whether products are left to the matrix unit.
template <class T>
using UsesTiles = std::bool_constant<HAS_AMX && Words<T>::kPairs>;

// What rows and results are where weights are T, and what rows are read as: words for pairs, else floats.
template <class T>
struct Storage {
  using Value = T;
  using RowElement = std::conditional_t<Words<T>::kPairs, std::uint32_t, float>;
};

template <class T>
using Value = typename Storage<T>::Value;

template <class T>
using RowElement = typename Storage<T>::RowElement;

constexpr int panels_for(int rows) {
  const int most = kSumVectors / (rows * kPanelVectors);
  return most < 1 ? 1 : most > kMaxPanels ? kMaxPanels : most;
}

template <class T>
struct PackedShape {
  // Weights per 32-bit word.
  static constexpr i64 kPerWord = 4 / sizeof(T);
  static constexpr i64 kPrefetchBytes = 2048;
  // Elements of a widened row per word.
  static constexpr i64 kPerRowWord = Words<T>::kPairs ? 1 : kPerWord;
  // Slabs are multiples of so many words.
  static constexpr i64 kWordUnit = UsesTiles<T>::value ? 16 : 1;

  static i64 num_words(i64 num_inputs) { return divide_up(num_inputs, kPerWord); }
  static i64 panel_words(i64 num_words) { return num_words * kPanel; }
  static i64 row_size(i64 slab_words) { return slab_words * kPerRowWord; }
};

// One tile's operands: num_words of some rows and of some panels.
template <class T>
struct TileArgs {
  const RowElement<T>* x;
  i64 row_size;
  const std::uint32_t* weight;
  i64 panel_words, num_words;
  const char* ahead;  // what will be read next, fetched in steps of `ahead_step` bytes per word
  i64 ahead_step;
  bool is_stream;  // read once, from memory: that is quickest in order, one panel after the other
};

// sums[row][panel * kPanel ...] += rows times panels, or = where nothing is there yet.
template <class T, int Rows, int Panels>
__attribute__((noinline)) void multiply_panels(const TileArgs<T>& t, float* sums, i64 stride,
                                               bool is_first) {
  constexpr int kVectors = Panels * kPanelVectors;
  vf total[Rows][kVectors] = {};
  if (!is_first) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) total[r][v] = load(sums + r * stride + v * kLanes, Whole{});
    }
  }
  const std::uint32_t* weight = t.weight;
  const RowElement<T>* x = t.x;
  const RowElement<T>* x3 = t.x + (Rows > 3 ? 3 * t.row_size : 0);
  // One element of each row against one vector of each panel.
  const auto add = [&](int element, auto from_word) __attribute__((always_inline)) {
    vu right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int panel = v / kPanelVectors, part = v % kPanelVectors;
      right[v] = from_word(load_raw<vu>(weight + panel * t.panel_words + part * kLanes, Whole{}));
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const RowElement<T>* left = (r < 3 ? x : x3) + r % 3 * t.row_size + element;
      add_row<Words<T>::kPairs>(total[r], left, right);
    }
  };
  for (i64 word = 0; word < t.num_words; ++word, weight += kPanel) {
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      __builtin_prefetch(t.ahead + p * t.panel_words * 4 + word * t.ahead_step, 0, 3);
    }
    if constexpr (PackedShape<T>::kPerRowWord == 1) {
      add(0, [](vu word) { return word; });
    } else {
      add(0, [](vu word) { return word << 16; });
      // The words are read again, not kept: every register holds a sum or an operand.
      asm("" : "+r"(weight));
      add(1, [](vu word) { return word & 0xffff0000u; });
    }
    x += PackedShape<T>::kPerRowWord;
    x3 += PackedShape<T>::kPerRowWord;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(sums + r * stride + v * kLanes, total[r][v], Whole{});
  }
}

template <class T, int Rows>
void multiply_group(TileArgs<T> t, i64 num_panels, float* sums, i64 stride, bool is_first) {
  constexpr int kPanels = panels_for(Rows);
  const auto next = [&](i64 panels) {
    t.weight += panels * t.panel_words;
    t.ahead += panels * t.panel_words * 4;
    sums += panels * kPanel;
    num_panels -= panels;
  };
  for (; !t.is_stream && num_panels >= kPanels; next(kPanels)) {
    multiply_panels<T, Rows, kPanels>(t, sums, stride, is_first);
  }
  for (; num_panels > 0; next(1)) multiply_panels<T, Rows, 1>(t, sums, stride, is_first);
}

template <class T, int Rows = kPackedRows>
void multiply_some(i64 rows, const TileArgs<T>& t, i64 num_panels, float* sums, i64 stride,
                   bool is_first) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return multiply_group<T, Rows>(t, num_panels, sums, stride, is_first);
    multiply_some<T, Rows - 1>(rows, t, num_panels, sums, stride, is_first);
  }
}

template <class T>
inline void multiply_rows(i64 num_rows, const TileArgs<T>& t, i64 num_panels, float* sums, i64 stride,
                          bool is_first) {
  multiply_some(num_rows, t, num_panels, sums, stride, is_first);
}

// How a product is cut up.
template <class T>
struct PackedPlan {
  using Shape = PackedShape<T>;
  // Rows that meet a group of panels at once, where there are many.
  static constexpr i64 kBlockRows = UsesTiles<T>::value ? 32 : kPackedRows;
  static constexpr i64 kFewRows = UsesTiles<T>::value ? 16 : kPackedRows;
  static constexpr i64 kMostWords = UsesTiles<T>::value ? kSlabWords / 4 : kSlabWords;

  i64 num_words, slab_words, num_slabs;
  i64 block_rows, chunk_rows, num_chunks;
  i64 group_panels, piece_panels, num_pieces;  // of one chunk
  bool keeps_slabs;                            // else: all slabs of the rows are in memory at once

  // `unit` panels must not be parted.
  PackedPlan(const PackedLinearArgs& a, i64 num_panels, i64 unit)
      : num_words(Shape::num_words(a.num_inputs)) {
    const bool is_few = a.num_rows <= kFewRows;
    const i64 most_words = kMostWords * (a.num_rows <= kFewBlocks * kBlockRows ? 2 : 1);
    slab_words = is_few ? num_words : divide_up(num_words, divide_up(num_words, most_words));
    slab_words = round_up(slab_words, Shape::kWordUnit);
    num_slabs = divide_up(num_words, slab_words);
    block_rows = is_few ? kFewRows : kBlockRows;
    const i64 fitting = kRowSlabBytes / (row_size() * 4) / block_rows * block_rows;
    const i64 most = fitting < block_rows ? block_rows : fitting;
    chunk_rows = round_up(divide_up(a.num_rows, divide_up(a.num_rows, most)), block_rows);
    num_chunks = divide_up(a.num_rows, chunk_rows);
    keeps_slabs = num_chunks == 1 && slab_size() * num_slabs * 4 <= kKeptBytes;
    const i64 wanted = num_panels * num_chunks / (kPiecesPerThread * num_threads());
    const i64 few = wanted < 1 ? 1 : wanted > kMaxPiecePanels ? kMaxPiecePanels : wanted;
    group_panels = UsesTiles<T>::value ? 64 / block_rows
                                       : panels_for(is_few ? a.num_rows : kPackedRows);
    piece_panels = round_up(few, group_panels % unit == 0 ? group_panels : group_panels * unit);
    num_pieces = divide_up(num_panels, piece_panels);
  }

  i64 row_size() const { return Shape::row_size(slab_words); }
  i64 slab_size() const { return chunk_rows * row_size(); }
  i64 rows_bytes() const {
    return round_up(slab_size() * (keeps_slabs ? num_slabs : 1) * 4, kLine);
  }
  i64 num_bytes() const { return rows_bytes() + chunk_rows * piece_panels * kPanel * 4; }
};

// Of a slab, as multiply_panels reads it; what is past the row's end is zero.
template <class T>
void take_row(const T* from, i64 num_inputs, i64 slab_words, RowElement<T>* to, T) {
  const i64 size = PackedShape<T>::row_size(slab_words);
  if constexpr (Words<T>::kPairs) {
    for (i64 word = num_inputs / 2; word < size; ++word) to[word] = 0;
    std::memcpy(to, from, num_inputs * sizeof(T));
  } else {
    for (i64 i = num_inputs; i < size; ++i) to[i] = 0;
    for_lanes(num_inputs, [&](i64 i, auto extent) { store(to + i, load(from + i, extent), extent); });
  }
}

template <class T>
void take_slab(const PackedLinearArgs& a, const PackedPlan<T>& plan, i64 row, i64 slab,
               RowElement<T>* to) {
  const i64 size = plan.slab_words * PackedShape<T>::kPerWord;
  const i64 begin = slab * size, left = a.num_inputs - begin;
  const auto* from = static_cast<const Value<T>*>(a.x) + row * a.row_stride + begin;
  take_row(from, left < size ? left : size, plan.slab_words, to, T{});
}

// One thread's share of a product: takes pieces until none is left.
template <class T>
class PackedWorker {
 public:
  PackedWorker(const PackedLinearArgs& a, const PackedPlan<T>& plan, i64 num_panels, char* memory)
      : a_(a), plan_(plan), num_panels_(num_panels), rows_(reinterpret_cast<RowElement<T>*>(memory)),
        sums_(reinterpret_cast<float*>(memory + plan.rows_bytes())) {}

  // Calls emit(row, panel, sums) for every row and panel of the piece.
  template <class Emit>
  void run(i64 index, Emit emit) {
    const i64 row = index / plan_.num_pieces * plan_.chunk_rows;
    const i64 panel = index % plan_.num_pieces * plan_.piece_panels;
    const i64 rows_left = a_.num_rows - row, panels_left = num_panels_ - panel;
    const i64 rows = rows_left < plan_.chunk_rows ? rows_left : plan_.chunk_rows;
    const i64 panels = panels_left < plan_.piece_panels ? panels_left : plan_.piece_panels;
    for (i64 slab = 0; slab < plan_.num_slabs; ++slab) multiply_slab(slab, row, rows, panel, panels);
    for (i64 r = 0; r < rows; ++r) emit(row + r, panel, panels, sums_ + r * stride());
  }

 private:
  i64 stride() const { return plan_.piece_panels * kPanel; }

  void multiply_slab(i64 slab, i64 row, i64 num_rows, i64 panel, i64 num_panels) {
    const i64 first_word = slab * plan_.slab_words, left = plan_.num_words - first_word;
    const i64 panel_words = PackedShape<T>::panel_words(plan_.num_words);
    const auto* weight = static_cast<const std::uint32_t*>(a_.weight) + panel * panel_words;
    TileArgs<T> t = {taken(slab, row, num_rows), plan_.row_size(), weight + first_word * kPanel,
                     panel_words, left < plan_.slab_words ? left : plan_.slab_words,
                     nullptr, 0, false};
    const i64 num_blocks = divide_up(num_rows, plan_.block_rows);
    t.is_stream = num_blocks == 1 && num_rows <= kStreamRows;
    // One block of rows passes once over all panels; more of them meet some panels after another,
    // and each fetches its share of the next ones.
    const i64 group = num_blocks == 1 ? num_panels : plan_.group_panels;
    for (i64 p = 0; p < num_panels; p += group) {
      const i64 panels = num_panels - p < group ? num_panels - p : group;
      const char* next = reinterpret_cast<const char*>(t.weight + p * panel_words) +
                         (num_blocks == 1 ? PackedShape<T>::kPrefetchBytes : group * panel_words * 4);
      for (i64 b = 0; b < num_blocks; ++b) {
        const i64 first = first_row(b, num_blocks, num_rows);
        TileArgs<T> tile = t;
        tile.x += first * t.row_size;
        tile.weight += p * panel_words;
        tile.ahead = next + b * t.num_words * kLine / num_blocks;
        tile.ahead_step = divide_up(kLine, num_blocks);
        multiply_rows(first_row(b + 1, num_blocks, num_rows) - first, tile, panels,
                      sums_ + first * stride() + p * kPanel, stride(), slab == 0);
      }
    }
  }

  // Of a block: all nearly equal, or as many as there are tiles for.
  static i64 first_row(i64 block, i64 num_blocks, i64 num_rows) {
    if (!UsesTiles<T>::value) return block * num_rows / num_blocks;
    const i64 row = block * PackedPlan<T>::kBlockRows;
    return row < num_rows ? row : num_rows;
  }

  // The rows' part of a slab, made unless it is there.
  const RowElement<T>* taken(i64 slab, i64 row, i64 num_rows) {
    RowElement<T>* to = rows_ + (plan_.keeps_slabs ? slab * plan_.slab_size() : 0);
    if (plan_.keeps_slabs && slab < num_taken_) return to;
    for (i64 r = 0; r < num_rows; ++r) take_slab(a_, plan_, row + r, slab, to + r * plan_.row_size());
    num_taken_ = slab + 1;
    return to;
  }

  const PackedLinearArgs& a_;
  const PackedPlan<T>& plan_;
  const i64 num_panels_;
  RowElement<T>* rows_;
  float* sums_;
  i64 num_taken_ = 0;
};

// 32-bit words of up to 16 rows side by side: to[word][row], `stride` from word to word. Null rows
// become zeros; where they are more than the stride has room for, they are overwritten, and what is
// behind the last word is not.
inline void transpose_words(const char* const* rows, i64 num_words, std::uint32_t* to, i64 stride) {
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
        store_raw(to + (word + i) * stride + row, block[i], Whole{});
      }
    });
  }
}
