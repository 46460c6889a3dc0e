// Attention of sequences with one new token: the walk over their keys and values, read in place.
// Included by each level_*.cpp after attention_items.h; see there.
//
// An item is a range of a sequence's keys, taken in tiles with every head, so the cache is read in
// the order in which it lies, while the next tile is fetched: its blocks may be anywhere. How a
// tile's products are computed is said by those that walk (decode.h, decode_pairs.h).

constexpr i64 kMaxDirectGroup = 16;
constexpr i64 kTileSlots = 64;
constexpr i64 kTileBytes = 64 << 10;  // this tile and the next share a second-level cache
constexpr int kMaxQueries = kLanes < 8 ? kLanes : 8;
constexpr int kMaxValueRows = LANES == 16 ? 12 : 6;

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

// What is common to both ways; the queries of a group are taken in blocks of nearly equal size.
template <class C>
class DirectWalk {
 public:
  const Running& running() const { return running_; }

 protected:
  // `next` is what this thread will probably run next, or null.
  DirectWalk(const AttentionArgs& a, const Item& item, const Item* next, Running running)
      : a_(a), item_(item), g_(a), running_(running), next_(next),
        tile_size_(CacheTile<C>::size_for(a)),
        num_lines_(divide_up(g_.head_dim * i64{sizeof(C)}, kLine)) {}

  // Calls body(first query head, number of query heads as a type, is_first) for every tile, and for
  // every block of query heads; take_head() first for every key head of a tile.
  template <class TakeHead, class Body>
  void walk(TakeHead take_head, Body body) {
    tiles_[0].find(a_, item_.sequence, item_.first_key, item_.end_key, tile_size_);
    for (i64 head = 0; head < a_.num_heads; ++head) {
      running_.maxima[head] = -kInfinity;
      running_.totals[head] = 0;
    }
    for (i64 key = item_.first_key; key < item_.end_key; key += tile_size_) {
      find_ahead(key + tile_size_);
      for_queries([&](i64 head, i64 first, auto queries) {
        const bool is_new_head = first == head * g_.group;
        num_fetched_ = is_new_head ? num_lines_ : 0;
        offset_ = head * g_.head_dim;
        if (is_new_head) take_head(head);
        body(first, queries, key == item_.first_key);
      });
      current_ ^= 1;
    }
    for (i64 head = 0; head < a_.num_heads; ++head) running_.maxima[head] *= a_.scale;
  }

  const CacheTile<C>& tile() const { return tiles_[current_]; }

  const AttentionArgs& a_;
  const Item& item_;
  const Geometry g_;
  Running running_;
  i64 offset_ = 0;       // of the key head
  i64 num_fetched_ = 0;  // lines per key, of those ahead
  Fetcher<C> keys_ahead_, values_ahead_;

 private:
  void find_ahead(i64 key) {
    CacheTile<C>& tile = tiles_[current_ ^ 1];
    tile.num_keys = 0;
    if (key < item_.end_key) {
      tile.find(a_, item_.sequence, key, item_.end_key, tile_size_);
    } else if (next_ && next_->is_direct) {
      tile.find(a_, next_->sequence, next_->first_key, next_->end_key, tile_size_);
    }
    if constexpr (kIsQuantised<C>) tile.fetch_scales();
    keys_ahead_.start(tile.keys, tile.num_keys, a_.cache.num_heads * g_.head_dim);
    values_ahead_.start(tile.values, tile.num_keys, a_.cache.num_heads * g_.head_dim);
  }

  // Calls body(key head, first query head, number of query heads as a type).
  template <class Body>
  void for_queries(Body body) {
    const i64 num_blocks = divide_up(g_.group, kMaxQueries);
    for (i64 head = 0; head < a_.cache.num_heads; ++head) {
      for (i64 b = 0; b < num_blocks; ++b) {
        const i64 first = b * g_.group / num_blocks, end = (b + 1) * g_.group / num_blocks;
        some_queries(end - first, head, head * g_.group + first, body);
      }
    }
  }

  template <int Queries = kMaxQueries, class Body>
  static void some_queries(i64 num, i64 head, i64 first, Body body) {
    if constexpr (Queries > 0) {
      if (num == Queries) return body(head, first, std::integral_constant<int, Queries>());
      some_queries<Queries - 1>(num, head, first, body);
    }
  }

  const Item* next_;
  const i64 tile_size_, num_lines_;
  int current_ = 0;
  CacheTile<C> tiles_[2];
};
