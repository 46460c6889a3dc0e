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

// Fetches a tile while another is computed, by and by: all at once would be more than memory answers.
class PanelFetcher {
 public:
  // `panel_bytes`: of one head; `num_blocks`: of rows, each of which meets the other tile.
  void start(const PanelTile& tile, i64 num_heads, i64 panel_bytes, i64 num_blocks) {
    tile_ = &tile;
    panel_bytes_ = num_heads * panel_bytes;
    next_ = 0;
    at_ = end_ = nullptr;
    // Powers of two end where panels do: loops of one length are foreseen.
    lines_per_piece_ = num_blocks < 8 ? power_of_two_from(divide_up(kWordsAtOnce, num_blocks)) : 1;
    for (i64 i = 0; i < tile.num_panels; ++i) {
      for (i64 head = 0; head < num_heads; ++head) {
        __builtin_prefetch(tile.key_scales[i] + head * kTokensPerPanel, 0, 2);
        __builtin_prefetch(tile.value_scales[i] + head * kTokensPerPanel, 0, 2);
      }
    }
  }

  // As much as a block of rows reads of so many pieces.
  void fetch(i64 num_pieces) {
    i64 num = num_pieces * lines_per_piece_;
    while (num > 0 && (at_ != end_ || find_panel())) {
      const i64 left = (end_ - at_) / kLine, some = left < num ? left : num;
      for (i64 i = 0; i < some; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
      at_ += some * kLine;
      num -= some;
    }
  }

 private:
  bool find_panel() {
    const i64 n = tile_->num_panels;
    if (next_ == 2 * n) return false;
    at_ = reinterpret_cast<const char*>(next_ < n ? tile_->keys[next_] : tile_->values[next_ - n]);
    end_ = at_ + panel_bytes_;
    ++next_;
    return true;
  }

  const PanelTile* tile_;
  const char *at_ = nullptr, *end_ = nullptr;
  i64 panel_bytes_, lines_per_piece_, next_;
};
