// Causal grouped-query attention over a paged cache, with an online softmax.
// Included by each level_*.cpp after decode_pairs.h; see there. Source: arXiv:2205.14135 (tiling).

// What the products of several queries read: int8 expanded to what this level multiplies.
template <class T, class C>
using Expanded =
    std::conditional_t<!kIsQuantised<C>, T, std::conditional_t<Words<T>::kPairs, bf16, float>>;

template <class To>
inline void expand(const std::int8_t* from, To* to, i64 size) {
  for_lanes(size, [&](i64 i, auto extent) { store(to + i, load(from + i, extent), extent); });
}

template <class T, class C>
class ItemRun {
 public:
  using E = Expanded<T, C>;
  using W = Words<E>;

  static i64 num_scratch_words(const Geometry& g) {
    return kTileRows * g.head_dim + g.head_dim * kTileKeys + kTileKeys * g.padded_dim +
           2 * kBlockRows * kTileKeys + g.partial_size(kTileRows) +
           (kIsQuantised<C> ? 2 * kTileKeys * g.head_dim : 0);
  }

  ItemRun(const AttentionArgs& a, const Item& item, std::uint32_t* memory, float* partials)
      : a_(a), item_(item), g_(a), s_(a, item.sequence) {
    const i64 dim = g_.head_dim;
    queries_ = {memory, dim / W::kElements};
    keys_ = {memory += kTileRows * dim, kTileKeys, queries_.stride};
    values_ = {memory += dim * kTileKeys, g_.padded_dim, kTileKeys / W::kElements};
    scores_ = {reinterpret_cast<float*>(memory += kTileKeys * g_.padded_dim), kTileKeys};
    weights_ = {memory += kBlockRows * kTileKeys, kTileKeys / W::kElements};
    memory += kBlockRows * kTileKeys;
    expanded_ = reinterpret_cast<E*>(memory);
    if (kIsQuantised<C>) memory += 2 * kTileKeys * dim;
    running_ = running_at(item.partial < 0 ? reinterpret_cast<float*>(memory)
                                           : partials + item.partial,
                          item.num_places());
  }

  void run() {
    start();
    for (i64 key = item_.first_key / kTileKeys * kTileKeys; key < item_.end_key; key += kTileKeys) {
      find_rows(key);
      add_tile(key);
    }
    for (i64 r = 0; r < item_.num_rows; ++r) running_.maxima[r] *= a_.scale;
  }

  const Running& running() const { return running_; }

 private:
  void start() {
    for (i64 r = 0; r < item_.num_rows; ++r) {
      const i64 row = item_.first_row + r;
      const T* q = static_cast<const T*>(a_.q) + (s_.first_query + row / g_.group) * a_.q_stride +
                   (item_.kv_head * g_.group + row % g_.group) * g_.head_dim;
      std::uint32_t* to = queries_.words + r * queries_.stride;
      for_lanes(queries_.stride, [&](i64 word, auto extent) {
        store_raw(to + word, load_words(q + word * W::kElements, extent), extent);
      });
    }
    for (i64 r = 0; r < item_.num_places(); ++r) {
      running_.maxima[r] = -kInfinity;
      running_.totals[r] = 0;
    }
    std::memset(running_.rows, 0, item_.num_rows * g_.padded_dim * sizeof(float));
  }

  // Rows of keys [key, key + kTileKeys); null outside the item's range.
  void find_rows(i64 key) {
    for (i64 j = 0; j < kTileKeys; ++j) {
      const i64 token = key + j;
      const bool is_in = token >= item_.first_key && token < item_.end_key;
      key_rows_[j] = value_rows_[j] = nullptr;
      key_scales_[j] = value_scales_[j] = 0;
      if (is_in) find_row(j, Cell(a_, item_.sequence, token));
    }
  }

  void find_row(i64 j, const Cell& cell) {
    const i64 head = item_.kv_head, dim = g_.head_dim;
    const C* key = cell.key<C>(a_.cache) + head * dim;
    const C* value = cell.value<C>(a_.cache) + head * dim;
    if constexpr (kIsQuantised<C>) {
      E *key_row = expanded_ + 2 * j * dim, *value_row = key_row + dim;
      expand(key, key_row, dim);
      expand(value, value_row, dim);
      key_rows_[j] = key_row;
      value_rows_[j] = value_row;
      key_scales_[j] = cell.key_scale(a_.cache)[head];
      value_scales_[j] = cell.value_scale(a_.cache)[head];
    } else {
      key_rows_[j] = key;
      value_rows_[j] = value;
    }
  }

  // A few rows at a time: what they need of a tile, and the tile, stay in a first-level cache.
  void add_tile(i64 key) {
    pack_transposed(key_rows_, keys_);
    pack_values();
    for (i64 first = 0; first < item_.num_rows; first += kBlockRows) {
      const i64 left = item_.num_rows - first, num = left < kBlockRows ? left : kBlockRows;
      const i64 row = item_.first_row + first;
      const i64 begin = keys_of(row).begin, end = keys_of(row + num - 1).end;
      if (begin >= key + kTileKeys || end <= key) continue;
      num_seen_ = end - key < kTileKeys ? round_up(end - key, kLanes) : kTileKeys;
      add_tile_to(first, num, key);
    }
  }

  Visible keys_of(i64 row) const { return s_.keys_of(row / g_.group, a_.sliding_window); }

  void add_tile_to(i64 first, i64 num, i64 key) {
    const Matrix queries = {queries_.words + first * queries_.stride, queries_.stride};
    multiply<W::kPairs>(queries, num, keys_, num_seen_, keys_.num_steps, scores_, true);
    for (i64 r = 0; r < num; r += kLanes) weigh(first + r, num - r, key);
    const Sums out = {running_.rows + first * g_.padded_dim, g_.padded_dim};
    multiply<W::kPairs>(weights_, num, values_, g_.padded_dim, num_seen_ / W::kElements, out, false);
  }

  // Turns the scores of up to kLanes rows into weights, and rescales what they have gathered so far.
  void weigh(i64 first, i64 left, i64 key) {
    const i64 num = left < kLanes ? left : kLanes;
    vf rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i < num ? highest(first + i, key) : splat(-kInfinity);
    }
    const vf factor = splat(a_.scale * kLog2E);
    const Shift shift(load(running_.maxima + first, Whole{}), maxima(rows), factor);
    const vi is_higher = shift.maxima != load(running_.maxima + first, Whole{});
    store(running_.maxima + first, shift.maxima, Whole{});
    for (int i = 0; i < kLanes; ++i) {
      if (i < num && is_higher[i]) rescale(first + i, shift.rescale[i]);
      rows[i] = i < num ? exponentials(first + i, factor, shift.shift[i]) : vf{};
    }
    float* totals = running_.totals + first;
    store(totals, load(totals, Whole{}) * shift.rescale + sums(rows), Whole{});
  }

  vf highest(i64 r, i64 key) {
    const Visible visible = keys_of(item_.first_row + r);
    float* scores = scores_.values + r % kBlockRows * kTileKeys;
    if constexpr (kIsQuantised<C>) scale(scores);
    mask(scores, visible.begin - key, visible.end - key);
    vf most = splat(-kInfinity);
    for_seen([&](i64 j) { most = maximum(most, load(scores + j, Whole{})); });
    return most;
  }

  // Most often a whole tile: a loop of known length.
  template <class Body>
  void for_seen(Body body) const {
    if (num_seen_ == kTileKeys) {
      for (i64 j = 0; j < kTileKeys; j += kLanes) body(j);
    } else {
      for (i64 j = 0; j < num_seen_; j += kLanes) body(j);
    }
  }

  void scale(float* scores) {
    for_seen([&](i64 j) {
      store(scores + j, load(scores + j, Whole{}) * load(key_scales_ + j, Whole{}), Whole{});
    });
  }

  void mask(float* scores, i64 begin, i64 end) {
    if (begin <= 0 && end >= num_seen_) return;
    for (i64 j = 0; j < num_seen_; ++j) {
      if (j < begin || j >= end) scores[j] = -kInfinity;
    }
  }

  void rescale(i64 r, float factor) {
    float* row = running_.rows + r * g_.padded_dim;
    for (i64 d = 0; d < g_.padded_dim; d += kLanes) {
      store(row + d, load(row + d, Whole{}) * splat(factor), Whole{});
    }
  }

  vf exponentials(i64 r, vf factor, float shift) {
    using Stored = std::conditional_t<W::kPairs, bf16, float>;
    const i64 place = r % kBlockRows;
    const float* scores = scores_.values + place * kTileKeys;
    Stored* weights = reinterpret_cast<Stored*>(weights_.words + place * weights_.stride);
    vf total = {};
    for_seen([&](i64 j) {
      const vf weight = exp2_negative<T>(load(scores + j, Whole{}) * factor - splat(shift));
      total += weight;
      const vf of_value = load(value_scales_ + j, Whole{});
      store(weights + j, kIsQuantised<C> ? weight * of_value : weight, Whole{});
    });
    return total;
  }

  void pack_values() {
    for (i64 step = 0; step < values_.num_steps; ++step) {
      for_lanes(g_.head_dim, [&](i64 d, auto extent) {
        store_raw(values_.at(step, d), value_words(step, d, extent), Whole{});
      });
    }
  }

  template <class Extent>
  vu value_words(i64 step, i64 d, Extent extent) {
    if constexpr (W::kPairs) {
      const E *even = value_rows_[2 * step], *odd = value_rows_[2 * step + 1];
      const vh low = even ? load_raw<vh>(even + d, extent) : vh{};
      const vh high = odd ? load_raw<vh>(odd + d, extent) : vh{};
      return words_of(low) | (words_of(high) << 16);
    } else {
      const E* row = value_rows_[step];
      return row ? (vu)load(row + d, extent) : vu{};
    }
  }

  const AttentionArgs& a_;
  const Item& item_;
  const Geometry g_;
  const Sequence s_;
  Matrix queries_, weights_;
  Panels keys_, values_;
  Sums scores_;
  Running running_;
  const E* key_rows_[kTileKeys];
  const E* value_rows_[kTileKeys];
  E* expanded_;  // of int8: a tile's rows, keys and values in turn
  float key_scales_[kTileKeys], value_scales_[kTileKeys];
  i64 num_seen_ = kTileKeys;  // keys of a tile that some rows see, up to whole vectors
};

template <class T>
void write_rows(const AttentionArgs& a, const Item& item, const Running& running) {
  const Geometry g(a);
  const Sequence s(a, item.sequence);
  for (i64 head = 0; head < item.num_heads; ++head) {
    const i64 first_head = (item.kv_head + head) * g.group;
    for (i64 r = 0; r < item.num_rows; ++r) {
      const i64 row = item.first_row + r, place = head * item.num_places() + r;
      T* out = static_cast<T*>(a.out) + (s.first_query + row / g.group) * a.num_heads * g.head_dim +
               (first_head + row % g.group) * g.head_dim;
      const vf factor = splat(1.0f / running.totals[place]);
      const float* from = running.rows + place * g.padded_dim;
      for_lanes(g.head_dim, [&](i64 d, auto extent) {
        store(out + d, load(from + d, extent) * factor, extent);
      });
    }
  }
}

// How items are run and what comes of them, by the type of the cache: direct ones, of all heads, in a way
// of their own,
template <class T, class C>
struct Runs {
  using Direct = std::conditional_t<Words<C>::kPairs, PairedRun<C>, DirectRun<T, C>>;
  using Tile = ItemRun<T, C>;
  struct Kept {};

  static DirectItems direct(const AttentionArgs& a) {
    return Direct::can_take(a) ? DirectItems{a.cache.num_heads, Geometry(a).group} : DirectItems{};
  }

  static i64 num_rows(const AttentionArgs& a, const Item& item) {
    return item.is_direct ? a.num_heads : item.num_places();
  }

  static i64 num_scratch_words(const AttentionArgs& a) {
    const Geometry g(a);
    const i64 tile = Tile::num_scratch_words(g), direct = Direct::num_scratch_words(g, a.num_heads);
    return tile > direct ? tile : direct;
  }

  static void run(const AttentionArgs& a, const Item& item, const Item* next, Kept&,
                  std::uint32_t* memory, float* partials) {
    if (item.is_direct) {
      Direct run(a, item, next, memory, partials);
      run.run();
      if (item.partial < 0) write(a, item, run.running());
    } else {
      Tile run(a, item, memory, partials);
      run.run();
      if (item.partial < 0) write(a, item, run.running());
    }
  }

  static void write(const AttentionArgs& a, const Item& item, const Running& running) {
    if (!item.is_direct) return write_rows<T>(a, item, running);
    const i64 head_dim = a.cache.head_dim, first_query = Sequence(a, item.sequence).first_query;
    T* out = static_cast<T*>(a.out) + first_query * a.num_heads * head_dim;
    for (i64 head = 0; head < a.num_heads; ++head) {
      const vf factor = splat(1.0f / running.totals[head]);
      const i64 at = head * head_dim;
      Direct::write(running.rows + at, factor, head_dim, out + at);
    }
  }
};

// and where the cache is panels, all in one way.
template <class T>
struct Runs<T, Int16> {
  using Kept = IntegersKept;

  static DirectItems direct(const AttentionArgs& a) {
    return {heads_together(a.cache), round_up(Geometry(a).group, kLanes)};
  }

  static i64 num_rows(const AttentionArgs&, const Item& item) {
    return IntegerRun<T>::num_rows(item);
  }

  static i64 num_scratch_words(const AttentionArgs& a) {
    const DirectItems of_direct = direct(a);
    const i64 num_rows = of_direct.num_heads * of_direct.head_rows;
    const i64 num_blocks = IntegerRun<T>::blocks_together(of_direct.num_heads, of_direct.head_rows);
    return IntegerRun<T>::num_scratch_words(Geometry(a), num_rows > kTileRows ? num_rows : kTileRows,
                                            num_blocks);
  }

  static void run(const AttentionArgs& a, const Item& item, const Item* next, Kept& kept,
                  std::uint32_t* memory, float* partials) {
    IntegerRun<T> run(a, item, next, kept, memory, partials);
    run.run();
    if (item.partial < 0) write(a, item, run.running());
  }

  static void write(const AttentionArgs& a, const Item& item, const Running& running) {
    write_rows<T>(a, item, running);
  }
};

template <class T, class C>
void merge_parts(const AttentionArgs& a, const Item& item, float* partials) {
  const Geometry g(a);
  const i64 num_rows = Runs<T, C>::num_rows(a, item);
  const auto running_of = [&](i64 part) {
    return running_at(partials + item.partial + part * g.partial_size(num_rows), num_rows);
  };
  const Running first = running_of(0);
  for (i64 part = 1; part < item.num_parts; ++part) merge(g, num_rows, first, running_of(part));
  Runs<T, C>::write(a, item, first);
}

template <class T, class C>
bool run_items(const AttentionArgs& a, const Item* items, i64 num_items, float* partials) {
  const i64 num_bytes = 4 * Runs<T, C>::num_scratch_words(a);
  bool has_memory = true;
  Items all(items, num_items);
  auto body = [&](i64) {
    auto* memory = static_cast<std::uint32_t*>(scratch(num_bytes));
    if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    Items::Share share(all);
    typename Runs<T, C>::Kept kept;
    const Item* next = nullptr;
    while (const Item* item = next ? next : share.take()) {
      next = share.is_sure_of_more() ? share.take() : nullptr;  // so that it can be fetched meanwhile
      Runs<T, C>::run(a, *item, next, kept, memory, partials);
    }
  };
  parallel(num_threads(), 1, body);
  return has_memory;
}

template <class T, class C>
bool paged_attention(const AttentionArgs& a) {
  const DirectItems direct = Runs<T, C>::direct(a);
  i64 num_items = 0;
  const i64 partials_size = for_items(a, direct, [&](const Item&) { ++num_items; });
  Buffer items_memory(num_items * sizeof(Item));
  Buffer partials_memory(partials_size * sizeof(float));
  if (!items_memory || !partials_memory) return false;
  Item* items = items_memory.as<Item>();
  float* partials = partials_memory.as<float>();
  i64 next = 0;
  for_items(a, direct, [&](const Item& item) { items[next++] = item; });
  if (!run_items<T, C>(a, items, num_items, partials)) return false;
  auto body = [&](i64 index) {
    if (items[index].num_parts > 1) merge_parts<T, C>(a, items[index], partials);
  };
  if (partials_size > 0) parallel(num_items, 16, body);
  const i64 row_size = a.num_heads * a.cache.head_dim;
  const i64 num_used = a.num_sequences ? a.query_start[a.num_sequences] : 0;
  std::memset(static_cast<T*>(a.out) + num_used * row_size, 0,
              (a.num_rows - num_used) * row_size * sizeof(T));
  return true;
}
