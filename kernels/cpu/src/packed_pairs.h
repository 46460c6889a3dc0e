// Rows times a packed weight matrix, where pairs of bf16 are multiplied by one instruction.
// Included by each level_*.cpp after packed.h; see there.
//
// A thread reads panel after panel, one stream, and a panel meets a chunk of the rows, block by block:
// each of its words is read once for all rows of a block, whose words lie side by side, so that one
// pointer finds them. Sums stay in registers along a whole panel: a chain, as in packed.h.

#if HAS_BF16_DOT && !HAS_AMX

constexpr i64 kOneBlockRows = 24;   // registers for their sums
constexpr i64 kBlockPairRows = 16;  // of each of several blocks
constexpr i64 kPairPanels = 2;      // that leave together: the units of products, a line of outputs
constexpr i64 kChunkBytes = 1 << 20;  // of rows, that meet a panel in turn

struct PairPlan {
  i64 num_words, places;  // of a block's rows side by side
  i64 chunk_rows, num_chunks, num_blocks;
  i64 piece_panels, num_pieces;  // of one chunk

  // Panels that must not be parted leave together anyway.
  PairPlan(const PackedLinearArgs& a, i64 num_panels, i64 /*unit*/)
      : num_words(PackedShape<bf16>::num_words(a.num_inputs)) {
    const i64 fitting = kChunkBytes / (num_words * 4) / kBlockPairRows * kBlockPairRows;
    const i64 most = fitting < kOneBlockRows ? kOneBlockRows : fitting;
    num_chunks = divide_up(a.num_rows, most);
    chunk_rows = divide_up(a.num_rows, num_chunks);
    num_blocks = chunk_rows <= kOneBlockRows ? 1 : divide_up(chunk_rows, kBlockPairRows);
    places = power_of_two_from(divide_up(chunk_rows, num_blocks));
    const i64 wanted = num_panels * num_chunks / (kPiecesPerThread * num_threads());
    const i64 few = wanted < 1 ? 1 : wanted > kMaxPiecePanels ? kMaxPiecePanels : wanted;
    piece_panels = round_up(few, kPairPanels);
    num_pieces = divide_up(num_panels, piece_panels);
  }

  i64 block_words() const { return round_up(num_words * places + kPanel, kPanel); }
  i64 rows_bytes() const { return num_blocks * block_words() * 4; }
  i64 num_bytes() const { return rows_bytes() + chunk_rows * kPairPanels * kPanel * 4; }
};

// sums[row][0 ... 15] = rows times a panel; x: [word][place].
template <int Rows, int Places>
__attribute__((noinline)) void multiply_pairs_panel(const std::uint32_t* x,
                                                    const std::uint32_t* weight, i64 num_words,
                                                    bool fetches, float* sums) {
  vf total[Rows] = {};
  const i64 ahead = fetches ? PackedShape<bf16>::kPrefetchBytes / 4 : 0;
  for (i64 word = 0; word < num_words; ++word, x += Places, weight += kPanel) {
    __builtin_prefetch(weight + ahead, 0, 3);
    const vu pairs = load_raw<vu>(weight, Whole{});
    unrolled<Rows>([&](auto r) __attribute__((always_inline)) { add_pairs(total[r], pairs, x + r); });
  }
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    store(sums + r * kPairPanels * kPanel, total[r], Whole{});
  });
}

// Blocks of a product differ by a row at most, so that half of the places may be empty.
template <int Rows = kOneBlockRows>
void multiply_pairs_rows(i64 rows, i64 places, const std::uint32_t* x, const std::uint32_t* weight,
                         i64 num_words, bool fetches, float* sums) {
  if constexpr (Rows > 0) {
    constexpr int kPlaces = power_of_two_from(Rows);
    if (rows != Rows) {
      return multiply_pairs_rows<Rows - 1>(rows, places, x, weight, num_words, fetches, sums);
    }
    if constexpr (Rows == kPlaces) {
      if (places > Rows) {
        return multiply_pairs_panel<Rows, 2 * Rows>(x, weight, num_words, fetches, sums);
      }
    }
    multiply_pairs_panel<Rows, kPlaces>(x, weight, num_words, fetches, sums);
  }
}

// One thread's share of a product.
class PairWorker {
 public:
  PairWorker(const PackedLinearArgs& a, const PairPlan& plan, i64 num_panels, char* memory)
      : a_(a), plan_(plan), num_panels_(num_panels),
        rows_(reinterpret_cast<std::uint32_t*>(memory)),
        sums_(reinterpret_cast<float*>(memory + plan.rows_bytes())) {}

  template <class Emit>
  void run(i64 index, Emit emit) {
    take_chunk(index / plan_.num_pieces);
    const i64 first = index % plan_.num_pieces * plan_.piece_panels;
    const i64 after = first + plan_.piece_panels, end = after < num_panels_ ? after : num_panels_;
    for (i64 panel = first; panel < end; panel += kPairPanels) {
      const i64 panels = end - panel < kPairPanels ? end - panel : kPairPanels;
      for (i64 p = 0; p < panels; ++p) multiply_panel(panel + p, sums_ + p * kPanel);
      for (i64 r = 0; r < num_rows_; ++r) emit(row_ + r, panel, panels, sums_ + r * kStride);
    }
  }

 private:
  static constexpr i64 kStride = kPairPanels * kPanel;

  void take_chunk(i64 chunk) {
    if (chunk == chunk_) return;
    chunk_ = chunk;
    row_ = chunk * a_.num_rows / plan_.num_chunks;
    num_rows_ = (chunk + 1) * a_.num_rows / plan_.num_chunks - row_;
    for (i64 b = 0; b < plan_.num_blocks; ++b) take_block(b);
  }

  // Of a chunk.
  i64 first_row(i64 block) const { return block * num_rows_ / plan_.num_blocks; }

  void take_block(i64 block) {
    const i64 first_of_block = first_row(block), num_rows = first_row(block + 1) - first_of_block;
    std::uint32_t* to = rows_ + block * plan_.block_words();
    const bf16* from = static_cast<const bf16*>(a_.x) + (row_ + first_of_block) * a_.row_stride;
    if (plan_.places == 1) return take_row(from, a_.num_inputs, plan_.num_words, to, bf16{});
    const i64 num_whole = a_.num_inputs / 2;
    for (i64 first = 0; first < num_rows; first += kPanel) {
      const char* rows[kPanel] = {};
      for (i64 r = first; r < num_rows && r < first + kPanel; ++r) {
        rows[r - first] = reinterpret_cast<const char*>(from + r * a_.row_stride);
      }
      transpose_words(rows, num_whole, to + first, plan_.places);
    }
    for (i64 r = 0; r < num_rows && num_whole < plan_.num_words; ++r) {
      to[num_whole * plan_.places + r] = from[r * a_.row_stride + 2 * num_whole].bits;
    }
  }

  void multiply_panel(i64 panel, float* sums) {
    const auto* weight =
        static_cast<const std::uint32_t*>(a_.weight) + panel * plan_.num_words * kPanel;
    for (i64 b = 0; b < plan_.num_blocks; ++b) {
      const i64 row = first_row(b), rows = first_row(b + 1) - row;
      multiply_pairs_rows(rows, plan_.places, rows_ + b * plan_.block_words(), weight,
                          plan_.num_words, b == 0, sums + row * kStride);
    }
  }

  const PackedLinearArgs& a_;
  const PairPlan& plan_;
  const i64 num_panels_;
  i64 chunk_ = -1, row_ = 0, num_rows_ = 0;  // rows: of the chunk
  std::uint32_t* rows_;                      // [block][word][place]
  float* sums_;
};

#endif
