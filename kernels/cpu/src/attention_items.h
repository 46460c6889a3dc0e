// How causal grouped-query attention over a paged cache is cut into items, and how parts are merged.
// Included by each level_*.cpp after tiles.h; see there. Source: FlashDecoding (split over keys).
//
// An item is up to kTileRows query rows that share a key head (a row is a query and a head of its
// group) against a range of keys, so each key and value is read once for the group; or several heads of
// a sequence's only query (decode.h). A sequence with few rows is also split over its keys, at places
// that its length decides: neither other sequences nor the number of threads changes a result.

constexpr i64 kTileRows = 128;
constexpr i64 kBlockRows = 16;  // of a tile, taken through at a time; a multiple of kLanes
constexpr i64 kTileKeys = 64;
constexpr i64 kKeysPerItem = 512;
constexpr i64 kKeysPerDirectItem = 256;
constexpr i64 kManyKeys = 2048;  // of which there are items enough if they are as long as others
constexpr i64 kTokensPerPanel = 16;  // of caches of 16-bit integers, a panel's
constexpr float kLargestCached = 8191;  // of those integers

struct Item {
  i64 sequence;
  i64 kv_head, num_heads;     // the first, and how many
  bool is_direct;             // a sequence's only query
  i64 first_row, num_rows;    // in the sequence's rows for this key head: query * group + head
  i64 first_key, end_key;
  i64 partial;                // where its partial result is, -1 when it is the whole result
  i64 num_parts;              // on the first of its parts how many there are, otherwise 0

  i64 num_places() const { return round_up(num_rows, kLanes); }

  bool has_queries_of(const Item& other) const {
    return sequence == other.sequence && kv_head == other.kv_head && num_heads == other.num_heads &&
           first_row == other.first_row && num_rows == other.num_rows;
  }
};

struct Geometry {
  i64 group, head_dim, padded_dim;

  explicit Geometry(const AttentionArgs& a)
      : group(a.num_heads / a.cache.num_heads), head_dim(a.cache.head_dim),
        padded_dim(round_up(a.cache.head_dim, kLanes)) {}

  // A partial result: maxima, sums, and rows of padded_dim.
  i64 partial_size(i64 num_rows) const { return num_rows * (2 + padded_dim); }
};

// T: of the queries; C: of the cache. An int8 becomes, exactly, a number that the queries are
// multiplied with, and its scale is a factor of scores and weights.
template <class C>
constexpr bool kIsQuantised = std::is_same<C, std::int8_t>::value;

// The place of a key: its row of the first head, and that of its scales.
struct Cell {
  i64 block, row;

  Cell(const AttentionArgs& a, i64 sequence, i64 key)
      : block(a.block_tables[sequence * a.table_stride + key / a.cache.block_size]),
        row(key % a.cache.block_size * a.cache.num_heads) {}

  template <class C>
  const C* key(const PagedCache& cache) const {
    return static_cast<const C*>(cache.keys) + block * cache.key_block_stride + row * cache.head_dim;
  }
  template <class C>
  const C* value(const PagedCache& cache) const {
    return static_cast<const C*>(cache.values) + block * cache.value_block_stride +
           row * cache.head_dim;
  }
  const float* key_scale(const PagedCache& cache) const {
    return cache.key_scales + block * cache.key_scale_stride + row;
  }
  const float* value_scale(const PagedCache& cache) const {
    return cache.value_scales + block * cache.value_scale_stride + row;
  }
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

// Calls emit(item) for the items of some rows against their keys, cut at multiples of `step`; each
// has a partial result of `size` floats if there are several. Returns where the next may lie.
template <class Emit>
i64 emit_parts(Item item, Visible keys, i64 step, i64 partial, i64 size, Emit emit) {
  const i64 first_part = keys.begin / step;
  const i64 num_parts = (keys.end + step - 1) / step - first_part;
  for (i64 part = 0; part < num_parts; ++part) {
    const i64 from = (first_part + part) * step, to = from + step;
    item.first_key = from < keys.begin ? keys.begin : from;
    item.end_key = to < keys.end ? to : keys.end;
    item.partial = num_parts > 1 ? partial + part * size : -1;
    item.num_parts = part == 0 ? num_parts : 0;
    emit(item);
  }
  return num_parts > 1 ? partial + num_parts * size : partial;
}

// Of items of a sequence's only query: how many key heads they have at most, 0 where there are no such
// items, and how many rows a result has for each.
struct DirectItems {
  i64 num_heads, head_rows;
};

template <class Emit>
i64 emit_direct(const AttentionArgs& a, i64 sequence, DirectItems direct, i64 partial, Emit emit) {
  const Geometry g(a);
  const Visible keys = Sequence(a, sequence).keys_of(0, a.sliding_window);
  const i64 step = keys.end - keys.begin > kManyKeys ? kKeysPerItem : kKeysPerDirectItem;
  for (i64 head = 0; head < a.cache.num_heads; head += direct.num_heads) {
    const i64 left = a.cache.num_heads - head;
    const i64 num_heads = left < direct.num_heads ? left : direct.num_heads;
    const Item item = {sequence, head, num_heads, true, 0, g.group, 0, 0, 0, 0};
    const i64 size = g.partial_size(num_heads * direct.head_rows);
    partial = emit_parts(item, keys, step, partial, size, emit);
  }
  return partial;
}

// Calls emit(item) for every item; returns the floats that all partial results take.
template <class Emit>
i64 for_items(const AttentionArgs& a, DirectItems direct, Emit emit) {
  const Geometry g(a);
  i64 partial = 0;
  for (i64 r = 0; r < a.num_sequences; ++r) {
    const Sequence s(a, r);
    const i64 num_rows = s.num_queries * g.group;
    if (direct.num_heads > 0 && s.num_queries == 1) {
      partial = emit_direct(a, r, direct, partial, emit);
      continue;
    }
    for (i64 row = 0; row < num_rows; row += kTileRows) {
      const i64 rows = num_rows - row < kTileRows ? num_rows - row : kTileRows;
      const Visible keys = {s.keys_of(row / g.group, a.sliding_window).begin,
                            s.keys_of((row + rows - 1) / g.group, a.sliding_window).end};
      const i64 step = num_rows <= kTileRows ? kKeysPerItem : round_up(keys.end, kKeysPerItem);
      for (i64 head = 0; head < a.cache.num_heads; ++head) {
        const Item item = {r, head, 1, false, row, rows, 0, 0, 0, 0};
        partial = emit_parts(item, keys, step, partial, g.partial_size(item.num_places()), emit);
      }
    }
  }
  return partial;
}

// Items for threads to take, the last first: the longest of a prompt. Parts of one sequence are taken some
// at a time, for they begin alike.
class Items {
 public:
  Items(const Item* items, i64 num) : items_(items), num_left_(num) {}

  // What one thread takes.
  class Share {
   public:
    explicit Share(Items& all) : all_(all) {}

    // Null where none is left.
    const Item* take() {
      if (num_ == 0) num_ = all_.take(end_);
      return num_ > 0 ? all_.items_ + end_ + --num_ : nullptr;
    }

    // The last are left to whoever is free.
    bool is_sure_of_more() const {
      return num_ > 0 || __atomic_load_n(&all_.num_left_, __ATOMIC_RELAXED) > num_threads();
    }

   private:
    Items& all_;
    i64 end_ = 0, num_ = 0;
  };

 private:
  static constexpr i64 kMostAtOnce = 4;

  // Takes some, from `first` on; returns how many.
  i64 take(i64& first) {
    i64 left = __atomic_load_n(&num_left_, __ATOMIC_RELAXED);
    for (;;) {
      if (left == 0) return 0;
      const i64 num = num_at_once(left);
      first = left - num;
      if (__atomic_compare_exchange_n(&num_left_, &left, first, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
        return num;
      }
    }
  }

  i64 num_at_once(i64 left) const {
    const Item& last = items_[left - 1];
    const i64 share = left / (4 * num_threads()), most = share < kMostAtOnce ? share : kMostAtOnce;
    i64 num = 1;
    while (num < most && items_[left - 1 - num].has_queries_of(last)) ++num;
    return num;
  }

  const Item* items_;
  i64 num_left_;
};

// Where an item's running result lives: maxima, sums of exponentials, unnormalised rows.
struct Running {
  float *maxima, *totals, *rows;
};

inline Running running_at(float* memory, i64 num_rows) {
  return {memory, memory + num_rows, memory + 2 * num_rows};
}

// Adds part `other` into `into`; both describe the same rows.
inline void merge(const Geometry& g, i64 num_rows, Running into, Running other) {
  for (i64 r = 0; r < num_rows; ++r) {
    const float a = into.maxima[r], b = other.maxima[r], most = a > b ? a : b;
    if (b == -kInfinity) continue;
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
