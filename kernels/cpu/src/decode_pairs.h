// Attention of sequences with one new token where pairs of bf16 are multiplied by one instruction.
// Included by each level_*.cpp after decode.h; see there.
//
// A head of 16 keys is turned, in registers, so that a vector has one word of each: nothing is summed
// across lanes, and a query's words are broadcast. Of values, two keys' are interleaved and meet two
// weights, which are rounded to bf16 as they are for prompts. A row of the result holds, for each two
// vectors of values, first the elements whose pairs come out low, then the others.

#if HAS_BF16_DOT

constexpr int kMaxPairSums = 24;  // registers for them

typedef std::uint16_t vs __attribute__((vector_size(4 * LANES)));

// Of each 128 bits of two vectors of bf16 the low or the high half, element by element in turn.
constexpr int interleaved_lane(bool is_high, int lane) {
  return lane / 8 * 8 + (is_high ? 4 : 0) + lane % 8 / 2 + lane % 2 * 2 * kLanes;
}

template <bool IsHigh, int... Lane>
inline vu interleaved(vs even, vs odd, std::integer_sequence<int, Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return (vu)__builtin_shufflevector(even, odd, interleaved_lane(IsHigh, Lane)...);
#else
  return (vu)__builtin_shuffle(even, odd, vs{interleaved_lane(IsHigh, Lane)...});
#endif
}

template <bool IsHigh>
inline vu interleaved(vs even, vs odd) {
  return interleaved<IsHigh>(even, odd, std::make_integer_sequence<int, 2 * kLanes>());
}

template <class C>
class PairedRun : public DirectWalk<C> {
  using Walk = DirectWalk<C>;
  using Walk::a_, Walk::item_, Walk::g_, Walk::running_, Walk::offset_, Walk::num_fetched_;
  using Walk::keys_ahead_, Walk::values_ahead_, Walk::tile;

 public:
  static constexpr i64 kPerVector = 2 * kLanes;

  static bool can_take(const AttentionArgs& a) {
    const Geometry g(a);
    return g.group <= kMaxDirectGroup && g.head_dim % kPerVector == 0;
  }

  static i64 num_scratch_words(const Geometry& g, i64 num_heads) {
    return kScratchWords + g.partial_size(num_heads);
  }

  PairedRun(const AttentionArgs& a, const Item& item, const Item* next, std::uint32_t* memory,
            float* partials)
      : Walk(a, item, next, running_in(a, item, memory, partials)),
        scores_(reinterpret_cast<float*>(memory)),
        weights_(reinterpret_cast<bf16*>(memory + kMaxQueries * kTileSlots)) {}

  void run() {
    const Sequence s(a_, item_.sequence);
    const bf16* queries = static_cast<const bf16*>(a_.q) + s.first_query * a_.q_stride;
    this->walk([](i64) {}, [&](i64 first, auto num_queries, bool is_first) {
      constexpr int kQueries = decltype(num_queries)::value;
      score<kQueries>(queries + first * g_.head_dim);
      weigh<kQueries>(first);
      add_values<kQueries>(first, is_first);
    });
  }

  // A finished row as it was asked for.
  static void write(const float* from, vf factor, i64 head_dim, bf16* out) {
    for (i64 d = 0; d < head_dim; d += kPerVector) {
      bf16 low[kLanes], high[kLanes];
      store(low, load(from + d, Whole{}) * factor, Whole{});
      store(high, load(from + d + kLanes, Whole{}) * factor, Whole{});
      for (int i = 0; i < kLanes; i += 4) {
        std::memcpy(out + d + 2 * i, low + i, 4 * sizeof(bf16));
        std::memcpy(out + d + 2 * i + 4, high + i, 4 * sizeof(bf16));
      }
    }
  }

 private:
  static constexpr i64 kScratchWords = kMaxQueries * kTileSlots * 3 / 2;

  static Running running_in(const AttentionArgs& a, const Item& item, std::uint32_t* memory,
                            float* partials) {
    float* own = reinterpret_cast<float*>(memory + kScratchWords);
    return running_at(item.partial < 0 ? own : partials + item.partial, a.num_heads);
  }

  // scores_[query][key] = products of the tile's keys with the queries.
  template <int Queries>
  __attribute__((noinline)) void score(const bf16* queries) {
    alignas(64) std::uint32_t turned[2][kLanes * kLanes];
    Fetcher<C> keys_ahead = keys_ahead_;
    const i64 num_slots = tile().num_slots, head_dim = g_.head_dim;
    const C* const* rows = tile().keys;
    const bool fetches = num_fetched_ > 0;
    int current = 0;
    turn(rows, offset_, turned[0]);
    for (i64 slot = 0; slot < num_slots; slot += kLanes) {
      vf total[Queries] = {};
      for (i64 d = 0; d < head_dim; d += kPerVector) {
        // The next words are turned while these are multiplied: neither waits for the other.
        const bool is_last = d + kPerVector == head_dim;
        const i64 next_slot = is_last && slot + kLanes < num_slots ? slot + kLanes : slot;
        const i64 next_d = is_last ? 0 : d + kPerVector;
        const C* const* next_rows = rows + next_slot;
        const i64 at = offset_ + next_d;
        const std::uint32_t* words = turned[current];
        std::uint32_t* next = turned[current ^ 1];
        vu keys[kLanes];
        unrolled<kLanes>([&](auto word) __attribute__((always_inline)) {
          // As many words as lines in a head of so many keys.
          if (fetches) keys_ahead.fetch_line();
          const vu pairs = load_raw<vu>(words + word * kLanes, Whole{});
          unrolled<Queries>([&](auto q) __attribute__((always_inline)) {
            add_pairs(total[q], pairs, queries + q * head_dim + d + 2 * word);
          });
          constexpr int kUnit = 1 << word / 4, kStep = word % 4 * 2;
          if constexpr (kUnit == 1) {
            unrolled<4>([&](auto k) __attribute__((always_inline)) {
              keys[2 * kStep + k] = load_raw<vu>(next_rows[2 * kStep + k] + at, Whole{});
            });
          }
          transpose_step<kUnit, kStep>(keys);
          transpose_step<kUnit, kStep + 1>(keys);
        });
        unrolled<kLanes>([&](auto k) __attribute__((always_inline)) {
          store_raw(next + transposed_row(k) * kLanes, keys[k], Whole{});
        });
        current ^= 1;
      }
      unrolled<Queries>([&](auto q) __attribute__((always_inline)) {
        store(scores_ + q * kTileSlots + slot, total[q], Whole{});
      });
    }
    keys_ahead_ = keys_ahead;
  }

  // to[word][key] = a vector of words of each of some keys.
  static void turn(const C* const* rows, i64 offset, std::uint32_t* to) {
    vu keys[kLanes];
    unrolled<kLanes>([&](auto k) __attribute__((always_inline)) {
      keys[k] = load_raw<vu>(rows[k] + offset, Whole{});
    });
    transpose(keys);
    unrolled<kLanes>([&](auto k) __attribute__((always_inline)) {
      store_raw(to + k * kLanes, keys[k], Whole{});
    });
  }

  // Turns scores into weights, and finds the factors of what there was before.
  template <int Queries>
  __attribute__((noinline)) void weigh(i64 head) {
    const i64 num_keys = tile().num_keys, num_slots = tile().num_slots;
    vf rows[kLanes];
    unrolled<kLanes>([&](auto q) { rows[q] = splat(-kInfinity); });
    for (int q = 0; q < Queries; ++q) {
      float* scores = scores_ + q * kTileSlots;
      for (i64 j = num_keys; j < num_slots; ++j) scores[j] = -kInfinity;
      for (i64 j = 0; j < num_slots; j += kLanes) {
        rows[q] = maximum(rows[q], load(scores + j, Whole{}));
      }
    }
    const Part queries{Queries};
    const vf factor = splat(a_.scale * kLog2E);
    const Shift shift(load(running_.maxima + head, queries), maxima(rows), factor);
    store(factors_, shift.rescale, Whole{});
    store(running_.maxima + head, shift.maxima, queries);
    alignas(64) float shifts[kLanes];
    Fetcher<C> values_ahead = values_ahead_;
    const bool fetches = num_fetched_ > 0;
    store(shifts, shift.shift, Whole{});
    for (int q = 0; q < Queries; ++q) {
      rows[q] = vf{};
      for (i64 j = q * kTileSlots; j < q * kTileSlots + num_slots; j += kLanes) {
        const vf weight = exp2_negative<bf16>(load(scores_ + j, Whole{}) * factor - splat(shifts[q]));
        rows[q] += weight;
        if (fetches) values_ahead.fetch_line();
        store(weights_ + j, weight, Whole{});
      }
    }
    values_ahead_ = values_ahead;
    float* totals = running_.totals + head;
    store(totals, load(totals, queries) * shift.rescale + sums(rows), queries);
  }

  // Vectors of values that are multiplied in one pass.
  template <int Rows>
  static constexpr int width_for() {
    constexpr int kFitting = kMaxPairSums / (2 * Rows);
    return kFitting >= 4 ? 4 : kFitting >= 2 ? 2 : 1;
  }

  template <int Rows>
  void add_values(i64 head, bool is_first) {
    constexpr int kVectors = width_for<Rows>();
    const i64 num_vectors = g_.head_dim / kPerVector;
    const i64 num_passes = num_vectors / kVectors + num_vectors % kVectors;
    float* out = running_.rows + head * g_.head_dim;
    i64 v = 0;
    for (; v + kVectors <= num_vectors; v += kVectors) {
      add_columns<Rows, kVectors>(v * kPerVector, out + v * kPerVector, num_passes, is_first);
    }
    for (; v < num_vectors; ++v) {
      add_columns<Rows, 1>(v * kPerVector, out + v * kPerVector, num_passes, is_first);
    }
  }

  // Weighted values, Vectors vectors of each, into Rows rows.
  template <int Rows, int Vectors>
  __attribute__((noinline)) void add_columns(i64 column, float* out, i64 num_passes, bool is_first) {
    vf total[Rows][2 * Vectors] = {};
    const auto for_sums = [&](auto body) __attribute__((always_inline)) {
      unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
        unrolled<2 * Vectors>([&](auto c) __attribute__((always_inline)) {
          body(total[r][c], out + r * g_.head_dim + c * kLanes, r);
        });
      });
    };
    if (!is_first) {
      for_sums([&](vf& sum, float* at, int r) __attribute__((always_inline)) {
        sum = load(at, Whole{}) * splat(factors_[r]);
      });
    }
    const i64 num_slots = tile().num_slots, offset = offset_ + column;
    const C* const* rows = tile().values;
    const bf16* weights = weights_;
    Fetcher<C> values_ahead = values_ahead_;
    i64 owed = 0;
    for (i64 j = 0; j < num_slots; j += 2, weights += 2) {
      // All passes together fetch what they have read, evenly: memory is never idle, never flooded.
      owed += 2 * num_fetched_;
      for (; owed >= num_passes; owed -= num_passes) values_ahead.fetch_line();
      unrolled<Vectors>([&](auto v) __attribute__((always_inline)) {
        const vs even = load_raw<vs>(rows[j] + offset + v * kPerVector, Whole{});
        const vs odd = load_raw<vs>(rows[j + 1] + offset + v * kPerVector, Whole{});
        const vu low = interleaved<false>(even, odd), high = interleaved<true>(even, odd);
        unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
          add_pairs(total[r][2 * v], low, weights + r * kTileSlots);
          add_pairs(total[r][2 * v + 1], high, weights + r * kTileSlots);
        });
      });
    }
    values_ahead_ = values_ahead;
    for_sums([](vf& sum, float* at, int) __attribute__((always_inline)) {
      store(at, sum, Whole{});
    });
  }

  float* scores_;   // [query][key]
  bf16* weights_;   // [query][key]
  alignas(64) float factors_[kLanes];
};

#else

template <class C>
class PairedRun;

#endif
