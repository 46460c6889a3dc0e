// Panels of a cache of 16-bit integers: which a tile of keys has, and how the next ones are fetched.
// Included by each level_*.cpp after attention_items.h; see there. kernels/cache_panels.py defines them.

constexpr i64 kTilePanels = 8;
constexpr i64 kIntegerTileKeys = kTilePanels * kTokensPerPanel;
constexpr i64 kIntegerTileBytes = 64 << 10;  // this tile and the next share a second-level cache

// Keys and values of a tile, of an item's first head; those of its other heads follow.
struct PanelTile {
  i64 num_panels = 0;
  const std::uint32_t* keys[kTilePanels];
  const std::uint32_t* values[kTilePanels];
  const float* key_scales[kTilePanels];
  const float* value_scales[kTilePanels];

  // Of the item's keys from `key` on, as many as there are, at most `most` panels.
  void find(const AttentionArgs& a, const Item& item, i64 key, i64 most) {
    const PagedCache& cache = a.cache;
    const i64 first = item.first_key / kTokensPerPanel, end = divide_up(item.end_key, kTokensPerPanel);
    const i32* table = a.block_tables + item.sequence * a.table_stride;
    num_panels = end - key / kTokensPerPanel;
    if (num_panels > most) num_panels = most;
    const i64 head = item.kv_head == kAllHeads ? 0 : item.kv_head;
    for (i64 i = 0; i < num_panels; ++i) {
      i64 token = (key / kTokensPerPanel + i) * kTokensPerPanel;
      if (token < first * kTokensPerPanel) token = first * kTokensPerPanel;  // nobody sees these
      const i64 block = table[token / cache.block_size];
      const i64 place = token % cache.block_size * cache.num_heads + head * kTokensPerPanel;
      const auto panel = [&](const void* from, i64 stride) {
        const auto* integers = static_cast<const std::int16_t*>(from) + block * stride;
        return reinterpret_cast<const std::uint32_t*>(integers + place * cache.head_dim);
      };
      keys[i] = panel(cache.keys, cache.key_block_stride);
      values[i] = panel(cache.values, cache.value_block_stride);
      key_scales[i] = cache.key_scales + block * cache.key_scale_stride + place;
      value_scales[i] = cache.value_scales + block * cache.value_scale_stride + place;
    }
  }
};

// Fetches a tile line by line, as evenly over the time that another takes as is known.
class PanelFetcher {
 public:
  // `panel_bytes`: of all heads; `work`: of all that will be done meanwhile.
  void start(const PanelTile& tile, i64 panel_bytes, i64 work) {
    tile_ = &tile;
    panel_bytes_ = panel_bytes;
    num_left_ = 2 * tile.num_panels * panel_bytes / kLine;
    per_work_ = (num_left_ << 20) / (work > 0 ? work : 1) + 1;
    owed_ = 0;
    next_ = 0;
    at_ = end_ = nullptr;
    for (i64 i = 0; i < tile.num_panels; ++i) {
      __builtin_prefetch(tile.key_scales[i], 0, 2);
      __builtin_prefetch(tile.value_scales[i], 0, 2);
    }
  }

  void work_done(i64 work) {
    owed_ += work * per_work_;
    i64 num = owed_ >> 20;
    owed_ -= num << 20;
    if (num > num_left_) num = num_left_;
    num_left_ -= num;
    for (; num > 0; num -= fetch_lines(num)) {}
  }

 private:
  // As many as lie together, at most `most`; returns how many.
  i64 fetch_lines(i64 most) {
    if (at_ == end_) {
      const i64 n = tile_->num_panels;
      at_ = reinterpret_cast<const char*>(next_ < n ? tile_->keys[next_] : tile_->values[next_ - n]);
      end_ = at_ + panel_bytes_;
      ++next_;
    }
    const i64 left = (end_ - at_) / kLine, num = left < most ? left : most;
    for (i64 i = 0; i < num; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += num * kLine;
    return num;
  }

  const PanelTile* tile_;
  const char *at_ = nullptr, *end_ = nullptr;
  i64 panel_bytes_, num_left_, per_work_, owed_, next_;
};

