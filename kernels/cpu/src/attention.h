// Causal grouped-query attention over a paged cache, with an online softmax.
// Included by each level_*.cpp after tiles.h; see there. Source: arXiv:2205.14135 (tiling),
// FlashDecoding (split over keys).
//
// Work is cut into items: up to kTileRows query rows that share a key head (a row is a query and a
// head of its group) against a range of keys, so each key and value is read once for the group.
// A sequence with few rows is also split over its keys, always at the same places: neither other
// sequences nor the number of threads changes a result.

constexpr i64 kTileRows = 64;
constexpr i64 kTileKeys = 64;
constexpr i64 kKeysPerItem = 512;

struct Item {
  i64 sequence, kv_head;
  i64 first_row, num_rows;    // in the sequence's rows for this key head: query * group + head
  i64 first_key, end_key;
  i64 partial;                // index of its partial result, -1 when it is the whole result
  i64 num_parts;              // on the first of its parts how many there are, otherwise 0
};

inline i64 round_up(i64 value, i64 multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Geometry {
  i64 group, head_dim, padded_dim;

  explicit Geometry(const AttentionArgs& a)
      : group(a.num_heads / a.cache.num_heads), head_dim(a.cache.head_dim),
        padded_dim(round_up(a.cache.head_dim, kLanes)) {}

  // A partial result: kTileRows maxima, sums, and rows of padded_dim.
  i64 partial_size() const { return kTileRows * (2 + padded_dim); }
};

struct Visible {
  i64 begin, end;
};

struct Sequence {
  i64 first_query, num_queries, first_position;

  Sequence(const AttentionArgs& a, i64 r)
      : first_query(a.query_start[r]), num_queries(a.query_start[r + 1] - a.query_start[r]),
        first_position(a.context_lens[r] - num_queries) {}

  Visible keys_of(i64 query, i64 window) const {
    const i64 position = first_position + query;
    return {window > 0 && position >= window ? position - window + 1 : 0, position + 1};
  }
};

// Calls emit(item) for every item; the count of partial results is returned.
template <class Emit>
i64 for_items(const AttentionArgs& a, Emit emit) {
  const Geometry g(a);
  i64 num_partials = 0;
  for (i64 r = 0; r < a.num_sequences; ++r) {
    const Sequence s(a, r);
    const i64 num_rows = s.num_queries * g.group;
    for (i64 row = 0; row < num_rows; row += kTileRows) {
      const i64 rows = num_rows - row < kTileRows ? num_rows - row : kTileRows;
      const i64 begin = s.keys_of(row / g.group, a.sliding_window).begin;
      const i64 end = s.keys_of((row + rows - 1) / g.group, a.sliding_window).end;
      const i64 step = num_rows <= kTileRows ? kKeysPerItem : round_up(end, kKeysPerItem);
      const i64 first_part = begin / step;
      const i64 num_parts = (end + step - 1) / step - first_part;
      for (i64 head = 0; head < a.cache.num_heads; ++head) {
        for (i64 part = 0; part < num_parts; ++part) {
          const i64 from = (first_part + part) * step, to = from + step;
          emit(Item{r, head, row, rows, from < begin ? begin : from, to < end ? to : end,
                    num_parts > 1 ? num_partials++ : -1, part == 0 ? num_parts : 0});
        }
      }
    }
  }
  return num_partials;
}

// Where an item's running result lives: maxima, sums of exponentials, unnormalised rows.
struct Running {
  float *maxima, *totals, *rows;
};

inline Running running_at(float* memory) {
  return {memory, memory + kTileRows, memory + 2 * kTileRows};
}

template <class T>
class ItemRun {
 public:
  using W = Words<T>;

  static i64 num_scratch_words(const Geometry& g) {
    return kTileRows * g.head_dim + g.head_dim * kTileKeys + kTileKeys * g.padded_dim +
           2 * kTileRows * kTileKeys + g.partial_size();
  }

  ItemRun(const AttentionArgs& a, const Item& item, std::uint32_t* memory, float* partials)
      : a_(a), item_(item), g_(a), s_(a, item.sequence) {
    const i64 dim = g_.head_dim;
    queries_ = {memory, dim / W::kElements};
    keys_ = {memory += kTileRows * dim, kTileKeys};
    values_ = {memory += dim * kTileKeys, g_.padded_dim};
    scores_ = {reinterpret_cast<float*>(memory += kTileKeys * g_.padded_dim), kTileKeys};
    weights_ = {memory += kTileRows * kTileKeys, kTileKeys / W::kElements};
    memory += kTileRows * kTileKeys;
    running_ = running_at(item.partial < 0 ? reinterpret_cast<float*>(memory)
                                           : partials + item.partial * g_.partial_size());
  }

  void run() {
    start();
    for (i64 key = item_.first_key / kTileKeys * kTileKeys; key < item_.end_key; key += kTileKeys) {
      find_rows(key);
      add_tile(key);
    }
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
      running_.maxima[r] = -__builtin_inff();
      running_.totals[r] = 0;
    }
    std::memset(running_.rows, 0, item_.num_rows * g_.padded_dim * sizeof(float));
  }

  // Cache rows of keys [key, key + kTileKeys); null outside the item's range.
  void find_rows(i64 key) {
    const PagedCache& cache = a_.cache;
    const i32* table = a_.block_tables + item_.sequence * a_.table_stride;
    for (i64 j = 0; j < kTileKeys; ++j) {
      const i64 token = key + j;
      if (token < item_.first_key || token >= item_.end_key) {
        key_rows_[j] = value_rows_[j] = nullptr;
        continue;
      }
      const i64 block = table[token / cache.block_size];
      const i64 offset =
          (token % cache.block_size * cache.num_heads + item_.kv_head) * cache.head_dim;
      key_rows_[j] = static_cast<const T*>(cache.keys) + block * cache.key_block_stride + offset;
      value_rows_[j] =
          static_cast<const T*>(cache.values) + block * cache.value_block_stride + offset;
    }
  }

  void add_tile(i64 key) {
    const i64 rows = item_.num_rows;
    pack_transposed(key_rows_, kTileKeys, queries_.stride, keys_);
    std::memset(scores_.values, 0, rows * kTileKeys * sizeof(float));
    multiply<W::kPairs>(queries_, rows, keys_, kTileKeys, queries_.stride, scores_);
    for (i64 r = 0; r < rows; ++r) weigh(r, key);
    pack_values();
    const Sums out = {running_.rows, g_.padded_dim};
    multiply<W::kPairs>(weights_, rows, values_, g_.padded_dim, weights_.stride, out);
  }

  // Turns the scores of a row into weights, and rescales what the row has gathered so far.
  void weigh(i64 r, i64 key) {
    const i64 query = (item_.first_row + r) / g_.group;
    const Visible visible = s_.keys_of(query, a_.sliding_window);
    float* scores = scores_.values + r * kTileKeys;
    mask(scores, visible.begin - key, visible.end - key);
    const float old_maximum = running_.maxima[r];
    const float new_maximum = scaled_maximum(scores, old_maximum);
    running_.maxima[r] = new_maximum;
    if (new_maximum > old_maximum) rescale(r, old_maximum, new_maximum);
    // Nothing seen yet: any finite number turns the masked scores into zeros.
    const bool is_empty = new_maximum == -__builtin_inff();
    running_.totals[r] += exponentials(r, scores, is_empty ? 0.0f : new_maximum);
  }

  void mask(float* scores, i64 begin, i64 end) {
    if (begin <= 0 && end >= kTileKeys) return;
    for (i64 j = 0; j < kTileKeys; ++j) {
      if (j < begin || j >= end) scores[j] = -__builtin_inff();
    }
  }

  float scaled_maximum(float* scores, float old_maximum) {
    vf most = splat(old_maximum);
    for (i64 j = 0; j < kTileKeys; j += kLanes) {
      const vf scaled = load(scores + j, Whole{}) * splat(a_.scale);
      store(scores + j, scaled, Whole{});
      most = maximum(most, scaled);
    }
    return maximum(most);
  }

  void rescale(i64 r, float old_maximum, float new_maximum) {
    const vf factor = exp(splat(old_maximum - new_maximum));
    running_.totals[r] *= factor[0];
    float* row = running_.rows + r * g_.padded_dim;
    for (i64 d = 0; d < g_.padded_dim; d += kLanes) {
      store(row + d, load(row + d, Whole{}) * factor, Whole{});
    }
  }

  float exponentials(i64 r, const float* scores, float most) {
    using Stored = std::conditional_t<W::kPairs, bf16, float>;
    Stored* weights = reinterpret_cast<Stored*>(weights_.words + r * weights_.stride);
    vf total = {};
    for (i64 j = 0; j < kTileKeys; j += kLanes) {
      const vf weight = exp(load(scores + j, Whole{}) - splat(most));
      total += weight;
      store(weights + j, weight, Whole{});
    }
    return sum(total);
  }

  void pack_values() {
    for (i64 step = 0; step < kTileKeys / W::kElements; ++step) {
      std::uint32_t* to = values_.words + step * values_.stride;
      for_lanes(g_.head_dim, [&](i64 d, auto extent) {
        store_raw(to + d, value_words(step, d, extent), Whole{});
      });
    }
  }

  template <class Extent>
  vu value_words(i64 step, i64 d, Extent extent) {
    if constexpr (W::kPairs) {
      const T *even = value_rows_[2 * step], *odd = value_rows_[2 * step + 1];
      const vh low = even ? load_raw<vh>(even + d, extent) : vh{};
      const vh high = odd ? load_raw<vh>(odd + d, extent) : vh{};
      return __builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16);
    } else {
      const T* row = value_rows_[step];
      return row ? (vu)load(row + d, extent) : vu{};
    }
  }

  const AttentionArgs& a_;
  const Item& item_;
  const Geometry g_;
  const Sequence s_;
  Matrix queries_, keys_, values_, weights_;
  Sums scores_;
  Running running_;
  const T* key_rows_[kTileKeys];
  const T* value_rows_[kTileKeys];
};

template <class T>
void write_rows(const AttentionArgs& a, const Item& item, const Running& running) {
  const Geometry g(a);
  const Sequence s(a, item.sequence);
  for (i64 r = 0; r < item.num_rows; ++r) {
    const i64 row = item.first_row + r;
    T* out = static_cast<T*>(a.out) + (s.first_query + row / g.group) * a.num_heads * g.head_dim +
             (item.kv_head * g.group + row % g.group) * g.head_dim;
    const vf factor = splat(1.0f / running.totals[r]);
    const float* from = running.rows + r * g.padded_dim;
    for_lanes(g.head_dim, [&](i64 d, auto extent) {
      store(out + d, load(from + d, extent) * factor, extent);
    });
  }
}

// Adds part `other` into `into`; both describe the same rows.
inline void merge(const Geometry& g, i64 num_rows, Running into, Running other) {
  for (i64 r = 0; r < num_rows; ++r) {
    const float a = into.maxima[r], b = other.maxima[r], most = a > b ? a : b;
    if (b == -__builtin_inff()) continue;
    const vf mine = exp(splat(a - most)), theirs = exp(splat(b - most));
    into.maxima[r] = most;
    into.totals[r] = into.totals[r] * mine[0] + other.totals[r] * theirs[0];
    float* row = into.rows + r * g.padded_dim;
    const float* from = other.rows + r * g.padded_dim;
    for (i64 d = 0; d < g.padded_dim; d += kLanes) {
      store(row + d, load(row + d, Whole{}) * mine + load(from + d, Whole{}) * theirs, Whole{});
    }
  }
}

template <class T>
void merge_parts(const AttentionArgs& a, const Item& item, float* partials) {
  const Geometry g(a);
  const Running first = running_at(partials + item.partial * g.partial_size());
  for (i64 part = 1; part < item.num_parts; ++part) {
    const i64 index = item.partial + part;
    merge(g, item.num_rows, first, running_at(partials + index * g.partial_size()));
  }
  write_rows<T>(a, item, first);
}

template <class T>
bool run_items(const AttentionArgs& a, const Item* items, i64 num_items, float* partials) {
  const i64 num_scratch_bytes = 4 * ItemRun<T>::num_scratch_words(Geometry(a));
  bool has_memory = true;
  auto body = [&](i64 index) {
    const Item& item = items[num_items - 1 - index];  // the longest of a prompt come first
    auto* memory = static_cast<std::uint32_t*>(scratch(num_scratch_bytes));
    if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    ItemRun<T> run(a, item, memory, partials);
    run.run();
    if (item.partial < 0) write_rows<T>(a, item, run.running());
  };
  parallel(num_items, 1, body);
  return has_memory;
}

template <class T>
bool paged_attention(const AttentionArgs& a) {
  i64 num_items = 0;
  const i64 num_partials = for_items(a, [&](const Item&) { ++num_items; });
  Buffer items_memory(num_items * sizeof(Item));
  Buffer partials_memory(num_partials * Geometry(a).partial_size() * sizeof(float));
  if (!items_memory || !partials_memory) return false;
  Item* items = items_memory.as<Item>();
  float* partials = partials_memory.as<float>();
  i64 next = 0;
  for_items(a, [&](const Item& item) { items[next++] = item; });
  if (!run_items<T>(a, items, num_items, partials)) return false;
  auto body = [&](i64 index) {
    if (items[index].num_parts > 1) merge_parts<T>(a, items[index], partials);
  };
  if (num_partials > 0) parallel(num_items, 16, body);
  const i64 row_size = a.num_heads * a.cache.head_dim;
  const i64 num_used = a.num_sequences ? a.query_start[a.num_sequences] : 0;
  std::memset(static_cast<T*>(a.out) + num_used * row_size, 0,
              (a.num_rows - num_used) * row_size * sizeof(T));
  return true;
}
