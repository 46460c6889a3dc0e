// Attention of sequences with one new token by vectors of products, whatever a level has.
// Included by each level_*.cpp after decode_tiles.h; see there.
//
// A product with a key runs along its words: the lanes of many such products are summed together.
// Values are multiplied where they are: a word's halves become two vectors, so a row of the result
// holds, for each vector of words, first the even elements, then the odd ones.

constexpr int kMaxDotSums = LANES == 16 ? 28 : 14;
constexpr int kKeysAtOnce = 4;  // values in a step of a pass

// The scales of one head in a tile of int8.
class HeadScales {
 public:
  void take(const float* const* scales, i64 num_slots, i64 head) {
    for (i64 j = 0; j < num_slots; ++j) scales_[j] = scales[j][head];
  }

  // Factors of lanes, each key's for `Places` of them, from key `j` on.
  template <int Places>
  vf in_places(i64 j) const {
    const vu keys = load_raw<vu>(scales_ + j, Whole{});
    return (vf)in_places<Places>(keys, std::make_integer_sequence<int, kLanes>());
  }

 private:
  template <int Places, int... Lane>
  static vu in_places(vu keys, std::integer_sequence<int, Lane...>) {
    return shuffle<Lane / Places...>(keys, keys);
  }

  float scales_[kTileSlots + kLanes] = {};
};

template <class T, class C>
class DirectRun : public DirectWalk<C> {
  using Walk = DirectWalk<C>;
  using Walk::a_, Walk::item_, Walk::g_, Walk::running_, Walk::offset_, Walk::num_fetched_;
  using Walk::keys_ahead_, Walk::values_ahead_, Walk::tile;

 public:
  // Elements in a word of what is multiplied: int8 are converted as they are read.
  static constexpr i64 kPerWord = kIsQuantised<C> ? 1 : 4 / sizeof(C);
  static constexpr i64 kPerVector = kPerWord * kLanes;

  static bool can_take(const AttentionArgs& a) {
    const Geometry g(a);
    return g.group <= kMaxDirectGroup && g.head_dim % kPerVector == 0;
  }

  static i64 num_scratch_words(const Geometry& g, i64 num_heads) {
    return kMaxQueries * kTileSlots + num_heads * g.head_dim + g.partial_size(num_heads);
  }

  DirectRun(const AttentionArgs& a, const Item& item, const Item* next, std::uint32_t* memory,
            float* partials)
      : Walk(a, item, next, running_in(a, item, memory, partials)),
        num_vectors_(g_.head_dim / kPerVector),
        weights_(reinterpret_cast<float*>(memory)), queries_(memory + kMaxQueries * kTileSlots) {}

  void run() {
    this->walk([&](i64 head) { take_head(head); }, [&](i64 first, auto queries, bool is_first) {
      constexpr int kQueries = decltype(queries)::value;
      std::uint32_t* words = queries_ + first * g_.head_dim;
      if (is_first) take_queries<kQueries>(first, words);
      score<kQueries>(words);
      weigh<kQueries>(first);
      add_values<kQueries>(first, is_first);
    });
  }

  // A finished row as it was asked for.
  static void write(const float* from, vf factor, i64 head_dim, T* out) {
    for (i64 d = 0; d < head_dim; d += kPerVector) {
      const vf first = load(from + d, Whole{}) * factor;
      if constexpr (kPerWord == 2) {
        const vf second = load(from + d + kLanes, Whole{}) * factor;
        const vu low = words_of(narrow(first));
        const vu high = words_of(narrow(second));
        store_raw(out + d, low | (high << 16), Whole{});
      } else {
        store(out + d, first, Whole{});
      }
    }
  }

 private:
  static Running running_in(const AttentionArgs& a, const Item& item, std::uint32_t* memory,
                            float* partials) {
    const i64 used = kMaxQueries * kTileSlots + a.num_heads * a.cache.head_dim;
    float* own = reinterpret_cast<float*>(memory + used);
    return running_at(item.partial < 0 ? own : partials + item.partial, a.num_heads);
  }

  void take_head(i64 head) {
    if constexpr (kIsQuantised<C>) {
      key_scales_.take(tile().key_scales, tile().num_slots, head);
      value_scales_.take(tile().value_scales, tile().num_slots, head);
    }
  }

  static vu factors(vu words, int half) {
    if (kPerWord == 1) return words;
    return half == 0 ? words << 16 : words & 0xffff0000u;
  }

  // A vector of words of the rows or of the cache.
  template <class From>
  static vu load_vector(const From* from) {
    if constexpr (kIsQuantised<C>) {
      return (vu)load(from, Whole{});
    } else {
      return load_raw<vu>(from, Whole{});
    }
  }

  // to[vector][half][query][lane]
  template <int Queries>
  void take_queries(i64 head, std::uint32_t* to) {
    const Sequence s(a_, item_.sequence);
    const T* q = static_cast<const T*>(a_.q) + s.first_query * a_.q_stride + head * g_.head_dim;
    for (i64 v = 0; v < num_vectors_; ++v) {
      for (int i = 0; i < Queries; ++i) {
        const vu words = load_vector(q + i * g_.head_dim + v * kPerVector);
        for (int half = 0; half < kPerWord; ++half) {
          store_raw(to + ((v * kPerWord + half) * Queries + i) * kLanes, factors(words, half),
                    Whole{});
        }
      }
    }
  }

  // weights_[key][place] = products of the tile's keys with the queries.
  template <int Queries>
  __attribute__((noinline)) void score(const std::uint32_t* queries) {
    constexpr int kPlaces = power_of_two_from(Queries), kKeys = kLanes / kPlaces;
    constexpr int kGroups = 2 * kKeys * Queries <= kMaxDotSums ? 2 : 1;  // of keys, if registers do
    Fetcher<C> keys_ahead = keys_ahead_;
    const i64 num_slots = tile().num_slots, offset = offset_;
    const i64 num_fetched = num_fetched_ * kGroups * kKeys;
    for (i64 slot = 0; slot < num_slots; slot += kGroups * kKeys) {
      for (i64 i = 0; i < num_fetched; ++i) keys_ahead.fetch_line();
      vf total[kGroups][kLanes] = {};
      const std::uint32_t* query = queries;
      const C* const* rows = tile().keys + slot;
      for (i64 v = 0; v < num_vectors_; ++v) {
        vu words[kGroups * kKeys];
        unrolled<kGroups * kKeys>([&](auto k) __attribute__((always_inline)) {
          words[k] = load_vector(rows[k] + offset + v * kPerVector);
        });
        unrolled<kPerWord>([&](auto half) __attribute__((always_inline)) {
          unrolled<Queries>([&](auto q) __attribute__((always_inline)) {
            unrolled<kGroups * kKeys>([&](auto k) __attribute__((always_inline)) {
              vf& sum = total[k / kKeys][k % kKeys * kPlaces + q];
              add_product(sum, factors(words[k], half), query);
            });
            query += kLanes;
          });
        });
      }
      unrolled<kGroups>([&](auto group) __attribute__((always_inline)) {
        const i64 key = slot + group * kKeys;
        vf scores = sums(total[group]);
        if constexpr (kIsQuantised<C>) scores *= key_scales_.in_places<kPlaces>(key);
        store(weights_ + key * kPlaces, scores, Whole{});
      });
    }
    keys_ahead_ = keys_ahead;
  }

  // One value per query, again and again over the lanes.
  template <int Queries>
  static vf in_places(const float* values) {
    constexpr int kPlaces = power_of_two_from(Queries);
    float lanes[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane % kPlaces < Queries) lanes[lane] = values[lane % kPlaces];
    }
    return load(lanes, Whole{});
  }

  template <int Places>
  vf of_values(vf weight, i64 key) const {
    if constexpr (kIsQuantised<C>) {
      return weight * value_scales_.in_places<Places>(key);
    } else {
      return weight;
    }
  }

  // Turns scores into weights, and finds the factors of what there was before.
  template <int Queries>
  void weigh(i64 head) {
    constexpr int kPlaces = power_of_two_from(Queries);
    const i64 size = tile().num_slots * kPlaces;
    for (i64 i = tile().num_keys * kPlaces; i < size; ++i) weights_[i] = -kInfinity;
    vf highest = splat(-kInfinity);
    for (i64 i = 0; i < size; i += kLanes) highest = maximum(highest, load(weights_ + i, Whole{}));
    alignas(64) float lanes[kLanes];
    store(lanes, highest, Whole{});
    for (int lane = kPlaces; lane < kLanes; ++lane) {
      float& most = lanes[lane % kPlaces];
      most = lanes[lane] > most ? lanes[lane] : most;
    }
    const vf factor = splat(a_.scale * kLog2E);
    const Shift shift(in_places<Queries>(running_.maxima + head), in_places<Queries>(lanes), factor);
    store(factors_, shift.rescale, Whole{});
    vf total = {};
    for (i64 i = 0; i < size; i += kLanes) {
      const vf weight = exp2_negative<T>(load(weights_ + i, Whole{}) * factor - shift.shift);
      total += weight;
      store(weights_ + i, of_values<kPlaces>(weight, i / kPlaces), Whole{});
    }
    store(lanes, total, Whole{});
    for (int q = 0; q < Queries; ++q) {
      running_.maxima[head + q] = shift.maxima[q];
      running_.totals[head + q] *= factors_[q];
      for (int lane = q; lane < kLanes; lane += kPlaces) running_.totals[head + q] += lanes[lane];
    }
  }

  template <int Queries>
  void add_values(i64 head, bool is_first) {
    constexpr int kBlocks = (Queries + kMaxValueRows - 1) / kMaxValueRows;
    constexpr int kPlaces = power_of_two_from(Queries), kRows = Queries / kBlocks;
    static_assert(kBlocks <= 2, "");
    num_passes_ = num_passes<kRows>();
    if constexpr (kBlocks == 2) num_passes_ += num_passes<Queries - kRows>();
    add_to_rows<kRows, kPlaces>(0, head, is_first);
    if constexpr (kBlocks == 2) add_to_rows<Queries - kRows, kPlaces>(kRows, head, is_first);
  }

  // Vectors of words that are multiplied in one pass.
  template <int Rows>
  static constexpr int width_for() {
    constexpr int kFitting = 2 * kMaxValueRows / (kPerWord * Rows);
    return kFitting >= 4 ? 4 : kFitting >= 2 ? 2 : 1;
  }

  template <int Rows>
  i64 num_passes() const {
    return num_vectors_ / width_for<Rows>() + num_vectors_ % width_for<Rows>();
  }

  // The values of a head into the rows of some query heads, whose weights begin at `place`.
  template <int Rows, int Places>
  void add_to_rows(int place, i64 head, bool is_first) {
    constexpr int kVectors = width_for<Rows>();
    float* out = running_.rows + (head + place) * g_.head_dim;
    i64 v = 0;
    for (; v + kVectors <= num_vectors_; v += kVectors) {
      add_columns<Rows, kVectors, Places>(v * kPerVector, place, out + v * kPerVector, is_first);
    }
    for (; v < num_vectors_; ++v) {
      add_columns<Rows, 1, Places>(v * kPerVector, place, out + v * kPerVector, is_first);
    }
  }

  // Weighted values, Vectors vectors of words of each, into Rows rows.
  template <int Rows, int Vectors, int Places>
  __attribute__((noinline)) void add_columns(i64 column, int place, float* out, bool is_first) {
    // Two vectors of factors at a time, if there are two: the fewest registers.
    constexpr int kColumns = Vectors * kPerWord, kWidth = kColumns % 2 ? 1 : 2;
    vf total[kColumns / kWidth][Rows][kWidth] = {};
    const auto for_sums = [&](auto body) __attribute__((always_inline)) {
      unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
        unrolled<kColumns>([&](auto c) __attribute__((always_inline)) {
          body(total[c / kWidth][r][c % kWidth], out + r * g_.head_dim + c * kLanes, r);
        });
      });
    };
    if (!is_first) {
      for_sums([&](vf& sum, float* at, int r) __attribute__((always_inline)) {
        sum = load(at, Whole{}) * splat(factors_[place + r]);
      });
    }
    const i64 num_slots = tile().num_slots, offset = offset_ + column;
    const C* const* rows = tile().values;
    const float* weights = weights_ + place;
    Fetcher<C> values_ahead = values_ahead_;
    i64 owed = 0;
    for (i64 j = 0; j < num_slots; j += kKeysAtOnce, weights += kKeysAtOnce * Places) {
      // All passes together fetch what they have read, evenly: memory is never idle, never flooded.
      owed += kKeysAtOnce * num_fetched_;
      for (; owed >= num_passes_; owed -= num_passes_) values_ahead.fetch_line();
#pragma GCC unroll 4
      for (i64 key = 0; key < kKeysAtOnce; ++key) {
        const C* row = rows[j + key] + offset;
        unrolled<kColumns / kWidth>([&](auto i) __attribute__((always_inline)) {
          vu right[kWidth];
          unrolled<kWidth>([&](auto c) __attribute__((always_inline)) {
            const vu words = load_vector(row + (i * kWidth + c) / kPerWord * kPerVector);
            right[c] = kPerWord == 1 ? words : c == 0 ? words << 16 : words & 0xffff0000u;
          });
          unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
            add_row<false>(total[i][r], weights + key * Places + r, right);
          });
        });
      }
    }
    values_ahead_ = values_ahead;
    for_sums([](vf& sum, float* at, int) __attribute__((always_inline)) {
      store(at, sum, Whole{});
    });
  }

  const i64 num_vectors_;
  i64 num_passes_ = 1;  // over a head's values
  float* weights_;           // first scores: [key][place]
  std::uint32_t* queries_;   // of all heads
  alignas(64) float factors_[kLanes];
  HeadScales key_scales_, value_scales_;  // of int8
};
