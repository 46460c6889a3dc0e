// Attention of sequences with one new token: keys and values are read in place, once for all heads.
// Included by each level_*.cpp after attention_items.h; see there.
//
// An item is a range of a sequence's keys, taken in tiles with every head, so the cache is read in
// the order in which it lies, while the next tile is fetched: its blocks may be anywhere. A product
// with a key runs along its words: the lanes of many such products are summed together. Values are
// multiplied where they are: a word's halves become two vectors, so a row of the result holds, for
// each vector of words, first the even elements, then the odd ones.

constexpr i64 kMaxDirectGroup = 16;
constexpr i64 kTileSlots = 64;
constexpr i64 kTileBytes = 64 << 10;  // this tile and the next share a second-level cache
constexpr int kMaxDotQueries = kLanes < 8 ? kLanes : 8;
constexpr int kMaxDotSums = LANES == 16 ? 28 : 14;
constexpr int kKeysAtOnce = 4;  // values in a step of a pass
constexpr int kMaxValueRows = LANES == 16 ? 12 : 6;

// Places in a row of weights for `num_queries` of them.
constexpr int places_for(int num_queries) {
  int places = 1;
  while (places < num_queries) places *= 2;
  return places;
}

// The rows of the first head of some keys and values, and of their scales.
template <class C>
struct CacheTile {
  i64 num_keys, num_slots;  // rounded up: past the last key it is repeated
  const C* keys[kTileSlots];
  const C* values[kTileSlots];
  const float* key_scales[kTileSlots];  // of int8
  const float* value_scales[kTileSlots];

  static i64 size_for(const AttentionArgs& a) {
    const i64 token_bytes = 2 * a.cache.num_heads * a.cache.head_dim * i64{sizeof(C)};
    const i64 fitting = kTileBytes / token_bytes / kLanes * kLanes;
    return fitting < kLanes ? kLanes : fitting < kTileSlots ? fitting : kTileSlots;
  }

  // Of keys [key, end), as many as belong to one tile.
  void find(const AttentionArgs& a, i64 sequence, i64 key, i64 end, i64 tile_size) {
    num_keys = end - key < tile_size ? end - key : tile_size;
    num_slots = round_up(num_keys, kLanes);
    const PagedCache& cache = a.cache;
    i64 j = 0;
    while (j < num_keys) {
      Cell cell(a, sequence, key + j);
      const i64 end_row = cache.block_size * cache.num_heads;
      for (; cell.row < end_row && j < num_keys; ++j, cell.row += cache.num_heads) put(j, cell, cache);
      if (j == num_keys) {
        cell.row -= cache.num_heads;
        for (; j < num_slots; ++j) put(j, cell, cache);
      }
    }
  }

  void fetch_scales() const {
    for (i64 j = 0; j < num_keys; ++j) {
      __builtin_prefetch(key_scales[j], 0, 3);
      __builtin_prefetch(value_scales[j], 0, 3);
    }
  }

 private:
  void put(i64 j, const Cell& cell, const PagedCache& cache) {
    keys[j] = cell.key<C>(cache);
    values[j] = cell.value<C>(cache);
    if constexpr (kIsQuantised<C>) {
      key_scales[j] = cell.key_scale(cache);
      value_scales[j] = cell.value_scale(cache);
    }
  }
};

// Fetches rows, all heads of them, line by line.
template <class C>
class Fetcher {
 public:
  void start(const C* const* rows, i64 num_rows, i64 row_size) {
    next_row_ = rows;
    end_row_ = rows + num_rows;
    row_bytes_ = row_size * i64{sizeof(C)};
    at_ = end_ = nullptr;
  }

  void fetch_line() {
    if (at_ >= end_) {
      if (next_row_ == end_row_) return;
      at_ = reinterpret_cast<const char*>(*next_row_++);
      end_ = at_ + row_bytes_;
    }
    __builtin_prefetch(at_, 0, 2);
    at_ += kLine;
  }

 private:
  const C* const* next_row_;
  const C* const* end_row_;
  i64 row_bytes_;
  const char *at_, *end_;
};

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
class DirectRun {
 public:
  // Elements in a word of what is multiplied: int8 are converted as they are read.
  static constexpr i64 kPerWord = kIsQuantised<C> ? 1 : 4 / sizeof(C);
  static constexpr i64 kPerVector = kPerWord * kLanes;
  // Vectors of factors that a vector of words makes in a product with a query.
  static constexpr bool kPairs = Words<C>::kPairs;
  static constexpr int kDotHalves = kPairs ? 1 : kPerWord;

  static bool can_take(const AttentionArgs& a) {
    const Geometry g(a);
    return g.group <= kMaxDirectGroup && g.head_dim % kPerVector == 0;
  }

  static i64 num_scratch_words(const Geometry& g, i64 num_heads) {
    return kMaxDotQueries * kTileSlots + num_heads * g.head_dim + direct_partial_size(g, num_heads);
  }

  // `next` is what this thread will probably run next, or null.
  DirectRun(const AttentionArgs& a, const Item& item, const Item* next, std::uint32_t* memory,
            float* partials)
      : a_(a), item_(item), next_(next), g_(a), num_vectors_(g_.head_dim / kPerVector),
        tile_size_(CacheTile<C>::size_for(a)),
        num_lines_(divide_up(g_.head_dim * i64{sizeof(C)}, kLine)) {
    weights_ = reinterpret_cast<float*>(memory);
    queries_ = memory += kMaxDotQueries * kTileSlots;
    float* own = reinterpret_cast<float*>(memory + a.num_heads * g_.head_dim);
    running_ = direct_running_at(item.partial < 0 ? own : partials + item.partial, a.num_heads);
  }

  void run() {
    tiles_[0].find(a_, item_.sequence, item_.first_key, item_.end_key, tile_size_);
    for (i64 head = 0; head < a_.num_heads; ++head) {
      running_.maxima[head] = -kInfinity;
      running_.totals[head] = 0;
    }
    for (i64 key = item_.first_key; key < item_.end_key; key += tile_size_) {
      find_ahead(key + tile_size_);
      for_queries([&](i64 head, i64 first, auto queries) {
        constexpr int kQueries = decltype(queries)::value;
        std::uint32_t* words = queries_ + first * g_.head_dim;
        if (key == item_.first_key) take_queries<kQueries>(first, words);
        num_fetched_ = first == head * g_.group ? num_lines_ : 0;
        if (num_fetched_) take_head(head);
        score<kQueries>(words);
        weigh<kQueries>(first);
        add_values<kQueries>(first, key == item_.first_key);
      });
      current_ ^= 1;
    }
    for (i64 head = 0; head < a_.num_heads; ++head) running_.maxima[head] *= a_.scale;
  }

  const Running& running() const { return running_; }

 private:
  const CacheTile<C>& tile() const { return tiles_[current_]; }

  void find_ahead(i64 key) {
    CacheTile<C>& tile = tiles_[current_ ^ 1];
    tile.num_keys = 0;
    if (key < item_.end_key) {
      tile.find(a_, item_.sequence, key, item_.end_key, tile_size_);
    } else if (next_ && next_->kv_head == kAllHeads) {
      tile.find(a_, next_->sequence, next_->first_key, next_->end_key, tile_size_);
    }
    if constexpr (kIsQuantised<C>) tile.fetch_scales();
    keys_ahead_.start(tile.keys, tile.num_keys, a_.cache.num_heads * g_.head_dim);
    values_ahead_.start(tile.values, tile.num_keys, a_.cache.num_heads * g_.head_dim);
  }

  void take_head(i64 head) {
    offset_ = head * g_.head_dim;
    if constexpr (kIsQuantised<C>) {
      key_scales_.take(tile().key_scales, tile().num_slots, head);
      value_scales_.take(tile().value_scales, tile().num_slots, head);
    }
  }

  // Calls body(key head, first query head, number of query heads as a type).
  template <class Body>
  void for_queries(Body body) {
    const i64 num_blocks = divide_up(g_.group, kMaxDotQueries);
    for (i64 head = 0; head < a_.cache.num_heads; ++head) {
      for (i64 b = 0; b < num_blocks; ++b) {
        const i64 first = b * g_.group / num_blocks, end = (b + 1) * g_.group / num_blocks;
        some_queries(end - first, head, head * g_.group + first, body);
      }
    }
  }

  template <int Queries = kMaxDotQueries, class Body>
  static void some_queries(i64 num, i64 head, i64 first, Body body) {
    if constexpr (Queries > 0) {
      if (num == Queries) return body(head, first, std::integral_constant<int, Queries>());
      some_queries<Queries - 1>(num, head, first, body);
    }
  }

  static vu factors(vu words, int half) {
    if (kDotHalves == 1) return words;
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
        for (int half = 0; half < kDotHalves; ++half) {
          store_raw(to + ((v * kDotHalves + half) * Queries + i) * kLanes, factors(words, half),
                    Whole{});
        }
      }
    }
  }

  // weights_[key][place] = products of the tile's keys with the queries.
  template <int Queries>
  __attribute__((noinline)) void score(const std::uint32_t* queries) {
    constexpr int kPlaces = places_for(Queries), kKeys = kLanes / kPlaces;
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
        unrolled<kDotHalves>([&](auto half) __attribute__((always_inline)) {
          unrolled<Queries>([&](auto q) __attribute__((always_inline)) {
            unrolled<kGroups * kKeys>([&](auto k) __attribute__((always_inline)) {
              vf& sum = total[k / kKeys][k % kKeys * kPlaces + q];
              add_product<kPairs>(sum, factors(words[k], half), query);
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
    constexpr int kPlaces = places_for(Queries);
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
    constexpr int kPlaces = places_for(Queries);
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
      const vf weight = exp2_negative(load(weights_ + i, Whole{}) * factor - shift.shift);
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
    constexpr int kPlaces = places_for(Queries), kRows = Queries / kBlocks;
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

  const AttentionArgs& a_;
  const Item& item_;
  const Item* next_;
  const Geometry g_;
  const i64 num_vectors_, tile_size_, num_lines_;
  i64 num_fetched_ = 0, num_passes_ = 1;  // lines per key; passes over a head's values
  Fetcher<C> keys_ahead_, values_ahead_;
  int current_ = 0;
  float* weights_;              // first scores: [key][place]
  std::uint32_t* queries_;      // of all heads
  Running running_;
  alignas(64) float factors_[kLanes];
  CacheTile<C> tiles_[2];
  i64 offset_ = 0;                        // of the head
  HeadScales key_scales_, value_scales_;  // of int8
};

template <class T, class C>
void write_direct(const AttentionArgs& a, const Item& item, const Running& running) {
  constexpr i64 kPerWord = DirectRun<T, C>::kPerWord;
  const Geometry g(a);
  const Sequence s(a, item.sequence);
  T* out = static_cast<T*>(a.out) + s.first_query * a.num_heads * g.head_dim;
  for (i64 head = 0; head < a.num_heads; ++head) {
    const vf factor = splat(1.0f / running.totals[head]);
    const float* from = running.rows + head * g.head_dim;
    for (i64 d = 0; d < g.head_dim; d += kPerWord * kLanes, out += kPerWord * kLanes) {
      const vf first = load(from + d, Whole{}) * factor;
      if constexpr (kPerWord == 2) {
        const vf second = load(from + d + kLanes, Whole{}) * factor;
        const vu low = __builtin_convertvector(narrow(first), vu);
        const vu high = __builtin_convertvector(narrow(second), vu);
        store_raw(out, low | (high << 16), Whole{});
      } else {
        store(out, first, Whole{});
      }
    }
  }
}
