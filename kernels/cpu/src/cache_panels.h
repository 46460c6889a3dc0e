// Panels of a cache of 16-bit integers: which a tile of keys has, and how the next ones are fetched.
// Included by each level_*.cpp after attention_items.h; see there. kernels/cache_panels.py defines them.

constexpr i64 kTilePanels = 16;
constexpr i64 kIntegerTileKeys = kTilePanels * kTokensPerPanel;
constexpr i64 kIntegerTileBytes = 128 << 10;  // keys, and values, which share a second-level cache
constexpr i64 kBytesTogether = 16 << 10;      // of a cache, worth reading by themselves
// While eight words of a panel meet all rows of an item, and where those are several blocks. One block is
// so quick that a part is left for the time when scores become weights.
constexpr i64 kManyLines = 7, kFewLines = 4;
static_assert(kKeysPerDirectItem % kIntegerTileKeys == 0 && kKeysPerItem % kIntegerTileKeys == 0,
              "items begin where tiles do");

// How many key heads an item of a sequence's only query takes.
inline i64 heads_together(const PagedCache& cache) {
  const i64 num = kBytesTogether / (kTokensPerPanel * cache.head_dim * 2);
  return num < 1 ? 1 : num < cache.num_heads ? num : cache.num_heads;
}

// Keys and values of a tile, of an item's first head; those of its other heads follow.
struct PanelTile {
  i64 num_panels = 0;
  const std::uint32_t* keys[kTilePanels];
  const std::uint32_t* values[kTilePanels];
  const float* key_scales[kTilePanels];
  const float* value_scales[kTilePanels];

  // Of the item's keys from `key` on, as many as there are, at most `most` panels.
  void find(const AttentionArgs& a, const Item& item, i64 key, i64 most) {
    const i64 first = key / kTokensPerPanel, end = divide_up(item.end_key, kTokensPerPanel);
    num_panels = end - first < most ? end - first : most;
    // Before an item's first key there may be no blocks, and nobody sees what stands here instead.
    const i64 least = item.first_key / kTokensPerPanel, start = first < least ? least : first;
    const i64 per_block = a.cache.block_size / kTokensPerPanel;
    const i32* block = a.block_tables + item.sequence * a.table_stride + start / per_block;
    i64 of_block = start % per_block;
    for (i64 i = 0; i < num_panels; ++i) {
      set(i, a.cache, *block, (of_block * a.cache.num_heads + item.kv_head) * kTokensPerPanel);
      if (first + i < least || ++of_block < per_block) continue;
      ++block;
      of_block = 0;
    }
  }

 private:
  // `place`: in a block, of a token and head.
  void set(i64 i, const PagedCache& cache, i64 block, i64 place) {
    const auto panel = [&](const void* from, i64 stride) {
      const auto* integers = static_cast<const std::int16_t*>(from) + block * stride;
      return reinterpret_cast<const std::uint32_t*>(integers + place * cache.head_dim);
    };
    keys[i] = panel(cache.keys, cache.key_block_stride);
    values[i] = panel(cache.values, cache.value_block_stride);
    key_scales[i] = cache.key_scales + block * cache.key_scale_stride + place;
    value_scales[i] = cache.value_scales + block * cache.value_scale_stride + place;
  }
};

// Panels of which all heads of an item, or of the next, are to be fetched.
struct PanelList {
  const std::uint32_t* const* panels;
  const float* const* scales;
  i64 num_panels, num_heads;
};

// Fetches panels while others are computed, in the order of memory, a few lines at a time: all at once
// would be more than memory answers, and while nothing is fetched it would have nothing to do.
class PanelFetcher {
 public:
  // `num_lines`: at a time.
  void add(const PanelList& list, i64 panel_bytes, i64 num_lines) {
    if (num_lines != num_lines_) fetch_rest();
    keep_rest();
    num_lines_ = num_lines;
    const i64 step = num_lines * kLine, of_panel = divide_up(list.num_heads * panel_bytes, step);
    const char** end = end_;
    for (i64 i = 0; i < list.num_panels && end + of_panel <= places_ + kMostPlaces; ++i) {
      for (i64 head = 0; head < list.num_heads; ++head) {
        __builtin_prefetch(list.scales[i] + head * kTokensPerPanel, 0, 2);
      }
      const char* at = reinterpret_cast<const char*>(list.panels[i]);
      for (i64 j = 0; j < of_panel; ++j, at += step) *end++ = at;
    }
    end_ = end;
  }

  // What is to be fetched `num` times; nothing anew where less is left.
  Ahead take(i64 num) {
    if (end_ - next_ < num) {
      fetch_rest();
      return {&idle_, 0};
    }
    next_ += num;
    return {next_ - num, sizeof(char*)};
  }

  // At most so many lines at once.
  void fetch(i64 num_lines) {
    for (; num_lines >= num_lines_ && next_ < end_; num_lines -= num_lines_, ++next_) {
      for (i64 i = 0; i < num_lines_; ++i) __builtin_prefetch(*next_ + i * kLine, 0, 3);
    }
  }

  // Before it is read.
  void fetch_rest() { fetch((end_ - next_) * num_lines_); }

 private:
  void keep_rest() {
    const i64 num = end_ - next_;
    std::memmove(places_, next_, num * sizeof *places_);
    next_ = places_;
    end_ = places_ + num;
  }

  static constexpr i64 kMostPlaces = 2 * kIntegerTileBytes / (kFewLines * kLine);

  const char* places_[kMostPlaces];
  const char **next_ = places_, **end_ = places_;
  const char* idle_ = reinterpret_cast<const char*>(places_);  // a place that is read anyway
  i64 num_lines_ = kFewLines;
};
