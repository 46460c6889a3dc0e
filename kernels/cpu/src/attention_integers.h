// Causal grouped-query attention over a cache of 16-bit integers, in panels.
// Included by each level_*.cpp after cache_panels.h; see there.
//
// Queries and weights are broadcast to panels of keys and values, so that scores of 16 tokens, or 16
// elements of a result, come without a sum across lanes and without a conversion of what is read. All
// are bounded so that sums are exact in 32 bits: keys and values are below 2^13, what a query, or a
// row's weights of a tile, add up to is at most 2^18, all as magnitudes.

// Of rows of scores, floats, and of weights, words: no powers of two, or rows would share a cache's sets.
constexpr i64 kScoreStride = kIntegerTileKeys + kPanel, kWeightStride = (kIntegerTileKeys + kPanel) / 2;
constexpr float kLargestRowSum = (1 << 18) - 128;  // rounding adds a half to each of 256 at most

// What an integer stands for in each of some rows, by their greatest magnitudes and by what those add
// up to over kLargestRowSum.
struct IntegerScales {
  vf scale, inverse;

  IntegerScales(vf most, vf by_sum) : scale(maximum(most * splat(1 / kLargestInteger), by_sum)) {
    inverse = select(scale > splat(kLeast), splat(1.0f) / scale, vf{});
  }
};

// Queries of a group, of one key head or of each in turn, against a range of keys.
template <class T>
class IntegerRun {
 public:
  // Rows of all heads of an item.
  static i64 num_rows(const Item& item) {
    return item.num_places() * item.num_heads;
  }

  static i64 num_scratch_words(const Geometry& g, i64 num_rows) {
    const i64 of_row = g.head_dim / 2 + 1, of_block_row = kScoreStride + kWeightStride + 2;
    return num_rows * of_row + kBlockRows * of_block_row + g.partial_size(num_rows);
  }

  IntegerRun(const AttentionArgs& a, const Item& item, const Item* next, std::uint32_t* memory,
             float* partials)
      : a_(a), item_(item), next_(next), g_(a), s_(a, item.sequence), row_words_(g_.head_dim / 2) {
    const i64 rows = num_rows(item);
    queries_ = memory;
    factors_ = reinterpret_cast<float*>(memory += rows * row_words_);
    scores_ = reinterpret_cast<float*>(memory += rows);
    weights_ = memory += kBlockRows * kScoreStride;
    weight_scales_ = reinterpret_cast<float*>(memory += kBlockRows * kWeightStride);
    rescales_ = weight_scales_ + kBlockRows;
    memory += 2 * kBlockRows;
    float* own = reinterpret_cast<float*>(memory);
    running_ = running_at(item.partial < 0 ? own : partials + item.partial, rows);
  }

  void run() {
    start();
    const i64 tile_keys = panels_at_once(item_) * kTokensPerPanel;
    const i64 first_tile = item_.first_key / tile_keys * tile_keys;
    tiles_[0].find(a_, item_, first_tile, panels_at_once(item_));
    for (key_ = first_tile; key_ < item_.end_key; key_ += tile_keys) {
      fetch_next(key_ + tile_keys);
      for (head_ = 0; head_ < item_.num_heads; ++head_) {
        take_scales();
        add_tile();
      }
      fetcher_.fetch_rest();
      current_ ^= 1;
    }
    // Of scores that the scale of their row has not multiplied.
    for (i64 r = 0; r < num_rows(item_); ++r) running_.maxima[r] *= factors_[r] / kLog2E;
  }

  const Running& running() const { return running_; }

 private:
  void start() {
    const i64 rows = num_rows(item_), places = item_.num_places();
    for (i64 place = 0; place < rows; place += kLanes) {
      const i64 head = place / places, first = place % places, left = item_.num_rows - first;
      take_queries(head, first, left < kLanes ? left : kLanes, place);
    }
    for (i64 r = 0; r < rows; ++r) {
      running_.maxima[r] = -kInfinity;
      running_.totals[r] = 0;
    }
    std::memset(running_.rows, 0, rows * g_.padded_dim * sizeof(float));
  }

  // Of one of the item's heads, up to kLanes rows, as integers with a scale.
  void take_queries(i64 head, i64 first, i64 num, i64 place) {
    vf most[kLanes] = {}, total[kLanes] = {};
    for (i64 r = 0; r < num; ++r) {
      const T* q = query(head, first + r);
      for (i64 i = 0; i < g_.head_dim; i += kLanes) {
        const vf magnitude = (vf)((vu)load(q + i, Whole{}) & 0x7fffffffu);
        most[r] = maximum(most[r], magnitude);
        total[r] += magnitude * splat(1 / kLargestRowSum);  // they may add up to more than a float
      }
    }
    const IntegerScales scales(maxima(most), sums(total));
    // A row of zeros: any number times its scores is 0.
    const vf scale = select(scales.scale < splat(kLeast), splat(1.0f), scales.scale);
    store(factors_ + place, scale * splat(a_.scale * kLog2E), Whole{});
    for (i64 r = 0; r < num; ++r) {
      const T* q = query(head, first + r);
      std::uint32_t* to = queries_ + (place + r) * row_words_;
      for (i64 i = 0; i < g_.head_dim; i += kPanel) {
        store_rounded(to + i / 2, q + i, splat(scales.inverse[r]));
      }
    }
  }

  const T* query(i64 head, i64 r) const {
    const i64 row = item_.first_row + r;
    return static_cast<const T*>(a_.q) + (s_.first_query + row / g_.group) * a_.q_stride +
           ((item_.kv_head + head) * g_.group + row % g_.group) * g_.head_dim;
  }

  // A power of two, so that items begin where tiles do.
  i64 panels_at_once(const Item& item) const {
    i64 num = kTilePanels;
    while (num > 1 && num * item.num_heads * 2 * panel_bytes() > kIntegerTileBytes) num /= 2;
    return num;
  }

  i64 panel_bytes() const { return kTokensPerPanel * g_.head_dim * 2; }

  void fetch_next(i64 key) {
    PanelTile& next = tiles_[current_ ^ 1];
    next.num_panels = 0;
    const Item* item = key < item_.end_key ? &item_ : next_;
    if (!item) return fetcher_.start(next, 0, 0, kFewLines);
    const i64 most = panels_at_once(*item), keys = most * kTokensPerPanel;
    next.find(a_, *item, key < item_.end_key ? key : item->first_key / keys * keys, most);
    const i64 num_lines = item_.num_rows <= kPackedRows ? kManyLines : kFewLines;
    fetcher_.start(next, item->num_heads, panel_bytes(), num_lines);
  }

  void take_scales() {
    const PanelTile& tile = tiles_[current_];
    for (i64 i = 0; i < tile.num_panels; ++i) {
      const i64 first = key_ + i * kTokensPerPanel, place = head_ * kTokensPerPanel;
      key_scales_[i] = tile.key_scales[i] + place;
      value_scales_[i] = tile.value_scales[i] + place;
      if (first >= item_.first_key && first + kTokensPerPanel <= item_.end_key) continue;
      key_scales_[i] = own_scales(key_scales_[i], first, cut_scales_[0][i]);
      value_scales_[i] = own_scales(value_scales_[i], first, cut_scales_[1][i]);
    }
  }

  // Of a token that is not the item's, whatever is stored there, 0.
  const float* own_scales(const float* scales, i64 first, float* to) const {
    for (i64 j = 0; j < kTokensPerPanel; ++j) {
      const i64 token = first + j;
      to[j] = token >= item_.first_key && token < item_.end_key ? scales[j] : 0;
    }
    return to;
  }

  void add_tile() {
    const i64 tile_panels = tiles_[current_].num_panels, base = head_ * item_.num_places();
    for (i64 first = 0; first < item_.num_rows; first += kBlockRows) {
      const i64 left = item_.num_rows - first, num = left < kBlockRows ? left : kBlockRows;
      const i64 row = item_.first_row + first;
      const Visible of_first = keys_of(row), of_last = keys_of(row + num - 1);
      const i64 begin = of_first.begin, end = of_last.end;
      num_panels_ = divide_up(end - key_, kTokensPerPanel);
      if (num_panels_ > tile_panels) num_panels_ = tile_panels;
      if (begin >= key_ + tile_panels * kTokensPerPanel || end <= key_) continue;
      is_cut_ = of_last.begin > key_ || of_first.end < key_ + num_panels_ * kTokensPerPanel;
      for_blocks(num, [&](i64 r, auto rows, auto lines) { score<rows, lines>(base + first + r, r); });
      for (i64 r = 0; r < num; r += kLanes) weigh(base, first + r, num - r);
      for_blocks(num, [&](i64 r, auto rows, auto lines) {
        add_values<rows, lines>(base + first + r, r);
      });
    }
  }

  Visible keys_of(i64 row) const { return s_.keys_of(row / g_.group, a_.sliding_window); }

  // body(first row, number of rows and of lines that each piece fetches as types): nearly equal numbers
  // of rows.
  template <class Body>
  static void for_blocks(i64 num_rows, Body body) {
    const i64 num_blocks = divide_up(num_rows, kPackedRows);
    if (num_blocks == 1) return some_rows<kManyLines>(num_rows, 0, body);
    for (i64 block = 0; block < num_blocks; ++block) {
      const i64 row = block * num_rows / num_blocks, end = (block + 1) * num_rows / num_blocks;
      some_rows<kFewLines>(end - row, row, body);
    }
  }

  template <int Lines, int Rows = kPackedRows, class Body>
  static void some_rows(i64 num, i64 row, Body body) {
    if constexpr (Rows > 0) {
      if (num != Rows) return some_rows<Lines, Rows - 1>(num, row, body);
      body(row, std::integral_constant<int, Rows>(), std::integral_constant<int, Lines>());
    }
  }

  template <int Rows, int Lines>
  __attribute__((noinline)) void score(i64 row, i64 place) {
    const i64 offset = head_ * panel_bytes() / 4;
    const i64 num_pieces = row_words_ / kWordsAtOnce;
    WordsArgs a = {queries_ + row * row_words_, row_words_, num_pieces,
                   fetcher_.take(num_panels_ * num_pieces)};
    float* scores = scores_ + place * kScoreStride;
    for (i64 p = 0; p < num_panels_; ++p, scores += kTokensPerPanel) {
      vi total[Rows][kPanelVectors];
      multiply_words<Lines>(total, a, tiles_[current_].keys[p] + offset);
      a.ahead = a.ahead.behind(a.num);
      for_sums(total, [&](int r, int v, vf sum) __attribute__((always_inline)) {
        const vf scale = load(key_scales_[p] + v * kLanes, Whole{});
        store(scores + r * kScoreStride + v * kLanes, sum * scale, Whole{});
      });
    }
  }

  template <int Rows, int Lines>
  __attribute__((noinline)) void add_values(i64 row, i64 place) {
    const i64 num_columns = g_.head_dim / kPanel;
    WordsArgs a = {weights_ + place * kWeightStride, kWeightStride, num_panels_,
                   fetcher_.take(num_panels_ * num_columns)};
    const i64 stride = g_.padded_dim;
    const float *scales = weight_scales_ + place, *rescales = rescales_ + place;
    float* out = running_.rows + row * stride;
    for (i64 column = 0; column < num_columns; ++column, out += kPanel) {
      vi total[Rows][kPanelVectors];
      multiply_words<Lines>(total, a, tiles_[current_].values,
                            head_ * panel_bytes() + column * kBytesAtOnce);
      a.ahead = a.ahead.behind(a.num);
      for_sums(total, [&](int r, int v, vf sum) __attribute__((always_inline)) {
        float* to = out + r * stride + v * kLanes;
        store(to, load(to, Whole{}) * splat(rescales[r]) + sum * splat(scales[r]), Whole{});
      });
    }
  }

  // body(row, vector, sum as floats).
  template <int Rows, class Body>
  static __attribute__((always_inline)) void for_sums(const vi (&total)[Rows][kPanelVectors], Body body) {
    unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
      unrolled<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
        body(r, v, __builtin_convertvector(total[r][v], vf));
      });
    });
  }

  // Turns the scores of up to kLanes rows into weights.
  void weigh(i64 base, i64 first, i64 left) {
    const i64 num = left < kLanes ? left : kLanes, place = first % kBlockRows;
    vf rows[kLanes], most[kLanes], total[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = i < num ? highest(first + i, place + i) : splat(-kInfinity);
    }
    float *so_far = running_.maxima + base + first, *totals = running_.totals + base + first;
    const vf factor = load(factors_ + base + first, Whole{});
    const Shift shift(load(so_far, Whole{}), maxima(rows), factor);
    store(so_far, shift.maxima, Whole{});
    store(rescales_ + place, shift.rescale, Whole{});
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = most[i] = total[i] = vf{};
      if (i < num) exponentials(place + i, factor[i], shift.shift[i], rows[i], most[i], total[i]);
    }
    store(totals, load(totals, Whole{}) * shift.rescale + sums(rows), Whole{});
    const IntegerScales scales(maxima(most), sums(total) * splat(1 / kLargestRowSum));
    store(weight_scales_ + place, scales.scale, Whole{});
    for (int i = 0; i < num; ++i) round_weights(place + i, scales.inverse[i]);
  }

  vf highest(i64 r, i64 place) {
    float* scores = scores_ + place * kScoreStride;
    if (is_cut_) mask(scores, keys_of(item_.first_row + r));
    vf most[kPanelVectors];
    for (vf& part : most) part = splat(-kInfinity);
    for_vectors([&](i64 j, int v) __attribute__((always_inline)) {
      most[v] = maximum(most[v], load(scores + j, Whole{}));
    });
    for (int v = 1; v < kPanelVectors; ++v) most[0] = maximum(most[0], most[v]);
    return most[0];
  }

  // body(first key, which vector of its panel).
  template <class Body>
  void for_vectors(Body body) {
    fetcher_.fetch(num_panels_);
    for (i64 panel = 0; panel < num_panels_; ++panel) {
      unrolled<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
        body(panel * kTokensPerPanel + v * kLanes, v);
      });
    }
  }

  void mask(float* scores, Visible visible) {
    const i64 num_seen = num_panels_ * kTokensPerPanel, end = visible.end - key_;
    for (i64 j = 0; j < visible.begin - key_ && j < num_seen; ++j) scores[j] = -kInfinity;
    for (i64 j = end > 0 ? end : 0; j < num_seen; ++j) scores[j] = -kInfinity;
  }

  __attribute__((noinline)) void exponentials(i64 place, float factor, float shift, vf& sum, vf& most,
                                             vf& total) {
    float* scores = scores_ + place * kScoreStride;
    vf sums[kPanelVectors] = {}, highest[kPanelVectors] = {}, totals[kPanelVectors] = {};
    const vf factors = splat(factor), shifts = splat(shift);
    for_vectors([&](i64 j, int v) __attribute__((always_inline)) {
      const vf weight = exp2_negative<T>(load(scores + j, Whole{}) * factors - shifts);
      const float* scales = value_scales_[j / kTokensPerPanel] + v * kLanes;
      const vf scaled = weight * load(scales, Whole{});
      sums[v] += weight;
      highest[v] = maximum(highest[v], scaled);
      totals[v] += scaled;
      store(scores + j, scaled, Whole{});
    });
    for (int v = 0; v < kPanelVectors; ++v) {
      sum += sums[v];
      most = maximum(most, highest[v]);
      total += totals[v];
    }
  }

  void round_weights(i64 place, float inverse) {
    const float* scores = scores_ + place * kScoreStride;
    std::uint32_t* to = weights_ + place * kWeightStride;
    const vf factor = splat(inverse);
    fetcher_.fetch(num_panels_);
    for (i64 panel = 0; panel < num_panels_; ++panel) {
      store_rounded(to + panel * kWordsAtOnce, scores + panel * kTokensPerPanel, factor);
    }
  }

  // kPanel numbers, times a factor.
  template <class From>
  static void store_rounded(std::uint32_t* to, const From* from, vf factor) {
#if LANES == 8 && defined(__AVX2__)
    const vf low = load(from, Whole{}) * factor, high = load(from + kLanes, Whole{}) * factor;
    const __m256i both =
        _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)low), _mm256_cvtps_epi32((__m256)high));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(both, 0xd8));
#else
    for (int i = 0; i < kPanel; i += kLanes) {
      store_integers(to, i, rounded(load(from + i, Whole{}) * factor));
    }
#endif
  }

  const AttentionArgs& a_;
  const Item& item_;
  const Item* next_;
  const Geometry g_;
  const Sequence s_;
  const i64 row_words_;
  std::uint32_t *queries_, *weights_;
  float *factors_, *scores_, *weight_scales_, *rescales_;
  Running running_;
  PanelTile tiles_[2];
  PanelFetcher fetcher_;
  int current_ = 0;
  i64 key_ = 0, head_ = 0;        // a tile's first, and which of the item's heads
  i64 num_panels_ = kTilePanels;  // of a tile that some rows see
  bool is_cut_ = false;           // whether some of those rows do not see all of that
  const float* key_scales_[kTilePanels];
  const float* value_scales_[kTilePanels];
  float cut_scales_[2][kTilePanels][kTokensPerPanel];  // of keys and of values
};
