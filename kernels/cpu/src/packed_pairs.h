// A few rows times a packed weight matrix, where pairs of bf16 are multiplied by one instruction.
// Included by each level_*.cpp after packed.h; see there.
//
// Few rows are limited by memory, which is read fastest as one stream: a thread reads panel after
// panel, and a panel's words meet all rows of a block before they are left. Rows lie word by word, so
// that one pointer finds them all. Every sum is the chain that packed.h makes of it.

#if HAS_BF16_DOT && !HAS_AMX

constexpr i64 kMostPairRows = 64;   // more meet panels as in packed.h
constexpr i64 kOneBlockRows = 24;   // registers for their sums
constexpr i64 kBlockPairRows = 16;  // of each of several blocks

constexpr i64 places_of(i64 rows) {
  i64 places = 1;
  while (places < rows) places *= 2;
  return places;
}

struct PairPlan {
  i64 num_words, num_blocks, places;     // of a block's rows side by side
  i64 piece_panels, num_pieces;

  PairPlan(const PackedLinearArgs& a, i64 num_panels, i64 unit)
      : num_words(PackedShape<bf16>::num_words(a.num_inputs)),
        num_blocks(a.num_rows <= kOneBlockRows ? 1 : divide_up(a.num_rows, kBlockPairRows)),
        places(places_of(divide_up(a.num_rows, num_blocks))) {
    const i64 wanted = num_panels / (2 * kPiecesPerThread * num_threads());
    const i64 few = wanted < 1 ? 1 : wanted > kMaxPiecePanels ? kMaxPiecePanels : wanted;
    piece_panels = round_up(few, unit);
    num_pieces = divide_up(num_panels, piece_panels);
  }

  i64 block_words() const { return round_up(num_words * places + kPanel, kPanel); }
  i64 rows_bytes() const { return num_blocks * block_words() * 4; }
  i64 sums_bytes(i64 num_rows) const { return num_rows * piece_panels * kPanel * 4; }
};

// sums[row][0 ... 15] = rows times a panel; x: [word][place].
template <int Rows>
__attribute__((noinline)) void multiply_pairs_panel(const std::uint32_t* x, const std::uint32_t* weight,
                                                    i64 num_words, bool fetches, float* sums,
                                                    i64 stride) {
  constexpr i64 kPlaces = places_of(Rows);
  vf total[Rows] = {};
  const i64 ahead = fetches ? kPrefetchBytes / 4 : 0;
  for (i64 word = 0; word < num_words; ++word, x += kPlaces, weight += kPanel) {
    __builtin_prefetch(weight + ahead, 0, 3);
    const vu pairs = load_raw<vu>(weight, Whole{});
    unrolled<Rows>([&](auto r) __attribute__((always_inline)) { add_pairs(total[r], pairs, x + r); });
  }
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    store(sums + r * stride, total[r], Whole{});
  });
}

template <int Rows = kOneBlockRows>
void multiply_pairs_rows(i64 rows, const std::uint32_t* x, const std::uint32_t* weight, i64 num_words,
                         bool fetches, float* sums, i64 stride) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      return multiply_pairs_panel<Rows>(x, weight, num_words, fetches, sums, stride);
    }
    multiply_pairs_rows<Rows - 1>(rows, x, weight, num_words, fetches, sums, stride);
  }
}

// One thread's share of a product.
class PairWorker {
 public:
  PairWorker(const PackedLinearArgs& a, const PairPlan& plan, i64 num_panels, char* memory)
      : a_(a), plan_(plan), num_panels_(num_panels),
        rows_(reinterpret_cast<std::uint32_t*>(memory)),
        sums_(reinterpret_cast<float*>(memory + plan.rows_bytes())) {
    for (i64 b = 0; b < plan.num_blocks; ++b) take_rows(b);
  }

  template <class Emit>
  void run(i64 piece, Emit emit) {
    const i64 first = piece * plan_.piece_panels, left = num_panels_ - first;
    const i64 panels = left < plan_.piece_panels ? left : plan_.piece_panels;
    const i64 stride = plan_.piece_panels * kPanel;
    for (i64 p = 0; p < panels; ++p) multiply_panel(first + p, sums_ + p * kPanel, stride);
    for (i64 r = 0; r < a_.num_rows; ++r) emit(r, first, panels, sums_ + r * stride);
  }

 private:
  i64 first_row(i64 block) const { return block * a_.num_rows / plan_.num_blocks; }

  void multiply_panel(i64 panel, float* sums, i64 stride) {
    const auto* weight =
        static_cast<const std::uint32_t*>(a_.weight) + panel * plan_.num_words * kPanel;
    for (i64 b = 0; b < plan_.num_blocks; ++b) {
      const i64 row = first_row(b), rows = first_row(b + 1) - row;
      // Blocks of one product may differ by a row, but not in their places.
      multiply_pairs_rows(rows, rows_ + b * plan_.block_words(), weight, plan_.num_words, b == 0,
                          sums + row * stride, stride);
    }
  }

  void take_rows(i64 block) {
    const i64 row = first_row(block), num_rows = first_row(block + 1) - row;
    std::uint32_t* to = rows_ + block * plan_.block_words();
    const bf16* from = static_cast<const bf16*>(a_.x) + row * a_.row_stride;
    if (num_rows == 1) return widen_row(from, a_.num_inputs, plan_.num_words, to);
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

  const PackedLinearArgs& a_;
  const PairPlan& plan_;
  const i64 num_panels_;
  std::uint32_t* rows_;  // [block][word][place]
  float* sums_;
};

template <class Emit>
bool pair_product(const PackedLinearArgs& a, i64 num_panels, i64 unit, Emit emit) {
  const PairPlan plan(a, num_panels, unit);
  i64 next = 0;
  bool has_memory = true;
  auto body = [&](i64) {
    auto* memory = static_cast<char*>(scratch(plan.rows_bytes() + plan.sums_bytes(a.num_rows)));
    if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    PairWorker worker(a, plan, num_panels, memory);
    for (;;) {
      const i64 index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= plan.num_pieces) return;
      worker.run(index, emit);
    }
  };
  parallel(num_threads(), 1, body);
  return has_memory;
}

#endif
