// Causal grouped-query attention over a cache of 16-bit integers, in panels.
// Included by each level_*.cpp after integer_softmax.h; see there.
//
// Queries and weights are broadcast to panels of keys and values, so that scores of 16 tokens, or 16
// elements of a result, come without a sum across lanes and without a conversion of what is read. All
// are bounded so that sums are exact in 32 bits: keys and values are below 2^13, what a query, or a
// row's weights of a tile, add up to is at most 2^18, all as magnitudes.

// What a thread keeps from one item to the next: what it fetches, and whose queries are integers already.
struct IntegersKept {
  PanelFetcher fetcher;
  const Item* item = nullptr;
};

// Queries of a group, of one key head or of several, against a range of keys.
//
// Of a tile first the keys meet the queries, then scores become weights, then the values meet those:
// of an item of several heads all heads in each of the three, so that a tile can have many keys. What
// comes next is fetched meanwhile, a tile's values while its keys are read.
template <class T>
class IntegerRun {
 public:
  // Rows of all heads of an item.
  static i64 num_rows(const Item& item) {
    return item.num_places() * item.num_heads;
  }

  // Blocks of rows of a sequence's only query that all have scores at a time.
  static i64 blocks_together(i64 num_heads, i64 head_rows) {
    const i64 num = num_heads * divide_up(head_rows, kBlockRows);
    return num < kMostBlocks ? num : kMostBlocks;
  }

  // `num_blocks`: so many have scores at a time.
  static i64 num_scratch_words(const Geometry& g, i64 num_rows, i64 num_blocks) {
    return num_rows * (g.head_dim / 2 + 1) + IntegerSoftmax<T>::num_words(num_blocks * kBlockRows) +
           g.partial_size(num_rows);
  }

  IntegerRun(const AttentionArgs& a, const Item& item, const Item* next, IntegersKept& kept,
             std::uint32_t* memory, float* partials)
      : a_(a), item_(item), next_(next), g_(a), s_(a, item.sequence), row_words_(g_.head_dim / 2),
        head_blocks_(divide_up(item.num_rows, kBlockRows)),
        blocks_at_once_(item.is_direct ? blocks_together(item.num_heads, item.num_rows) : 1), kept_(kept),
        fetcher_(kept.fetcher), queries_(memory),
        factors_(reinterpret_cast<float*>(queries_ + num_rows(item) * row_words_)),
        softmax_(reinterpret_cast<std::uint32_t*>(factors_ + num_rows(item)),
                 blocks_at_once_ * kBlockRows, fetcher_) {
    const i64 rows = num_rows(item);
    float* own = reinterpret_cast<float*>(
        queries_ + rows * (row_words_ + 1) +
        IntegerSoftmax<T>::num_words(blocks_at_once_ * kBlockRows));
    running_ = running_at(item.partial < 0 ? own : partials + item.partial, rows);
  }

  void run() {
    start();
    const i64 tile_keys = panels_at_once(item_) * kTokensPerPanel;
    key_ = item_.first_key / tile_keys * tile_keys;
    tiles_[0].find(a_, item_, key_, panels_at_once(item_));
    for (; key_ < item_.end_key; key_ += tile_keys) {
      find_next(key_ + tile_keys);
      const i64 num_blocks = item_.num_heads * head_blocks_;
      for (i64 block = 0; block < num_blocks; block += blocks_at_once_) add_tile(block);
      current_ ^= 1;
    }
    // Of scores that the scale of their row has not multiplied.
    for (i64 r = 0; r < num_rows(item_); ++r) running_.maxima[r] *= factors_[r] / kLog2E;
  }

  const Running& running() const { return running_; }

 private:
  static constexpr i64 kMostBlocks = 32;

  // Some rows of one of the item's heads.
  struct Block {
    i64 head, first, num;
    i64 row;         // where the first is among those of all heads
    i64 place;       // where its scores are
    i64 num_panels;  // of the tile that some of the rows see
    bool is_cut;     // whether some of them do not see all of that
  };

  void start() {
    const i64 rows = num_rows(item_);
    if (!kept_.item || !kept_.item->has_queries_of(item_)) take_all_queries();
    kept_.item = &item_;
    for (i64 r = 0; r < rows; ++r) {
      running_.maxima[r] = -kInfinity;
      running_.totals[r] = 0;
    }
    std::memset(running_.rows, 0, rows * g_.padded_dim * sizeof(float));
  }

  void take_all_queries() {
    const i64 rows = num_rows(item_), places = item_.num_places();
    for (i64 place = 0; place < rows; place += kLanes) {
      const i64 head = place / places, first = place % places, left = item_.num_rows - first;
      take_queries(head, first, left < kLanes ? left : kLanes, place);
    }
  }

  // Of one of the item's heads, up to kLanes rows, as integers with a scale.
  void take_queries(i64 head, i64 first, i64 num, i64 place) {
    vf most[kLanes], total[kLanes];
    for (i64 r = 0; r < kLanes; ++r) {
      vf highest = {}, sum = {};
      const i64 size = r < num ? g_.head_dim : 0;
      const T* q = size > 0 ? query(head, first + r) : nullptr;
      for (i64 i = 0; i < size; i += kLanes) {
        const vf magnitude = (vf)((vu)load(q + i, Whole{}) & 0x7fffffffu);
        highest = maximum(highest, magnitude);
        sum += magnitude * splat(1 / kLargestRowSum);  // they may add up to more than a float
      }
      most[r] = highest;
      total[r] = sum;
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
    while (num > 1 && num * item.num_heads * panel_bytes() > kIntegerTileBytes) num /= 2;
    return num;
  }

  i64 panel_bytes() const { return kTokensPerPanel * g_.head_dim * 2; }

  void find_next(i64 key) {
    PanelTile& next = tiles_[current_ ^ 1];
    next.num_panels = 0;
    const Item* item = key < item_.end_key ? &item_ : next_;
    next_heads_ = item ? item->num_heads : 0;
    if (!item) return;
    const i64 most = panels_at_once(*item), keys = most * kTokensPerPanel;
    next.find(a_, *item, key < item_.end_key ? key : item->first_key / keys * keys, most);
  }

  // For some blocks of rows from `first` on.
  void add_tile(i64 first) {
    const PanelTile &tile = tiles_[current_], &next = tiles_[current_ ^ 1];
    find_blocks(first);
    const auto for_blocks = [&](auto body) {
      for (i64 i = 0; i < num_blocks_; ++i) body(blocks_[i]);
    };
    if (first == 0) fetch(tile.values, tile.value_scales, tile.num_panels, item_.num_heads);
    for_blocks([&](const Block& b) { add_keys(b); });
    for_blocks([&](const Block& b) { weigh(b); });
    if (first == 0) {
      fetcher_.fetch_rest();
      fetch(next.keys, next.key_scales, next.num_panels, next_heads_);
    }
    for_blocks([&](const Block& b) { add_values(b); });
  }

  void fetch(const std::uint32_t* const* panels, const float* const* scales, i64 num_panels,
             i64 num_heads) {
    const i64 num_lines = item_.num_rows <= kPackedRows ? kManyLines : kFewLines;
    fetcher_.add({panels, scales, num_panels, num_heads}, panel_bytes(), num_lines);
  }

  // Those whose rows see something of the tile.
  void find_blocks(i64 first) {
    num_blocks_ = 0;
    const i64 most = item_.num_heads * head_blocks_ - first;
    for (i64 i = 0; i < blocks_at_once_ && i < most; ++i) {
      Block& b = blocks_[num_blocks_];
      b.head = (first + i) / head_blocks_;
      b.first = (first + i) % head_blocks_ * kBlockRows;
      b.place = num_blocks_ * kBlockRows;
      if (find_rows(b)) ++num_blocks_;
    }
  }

  bool find_rows(Block& b) const {
    const i64 left = item_.num_rows - b.first, row = item_.first_row + b.first;
    b.num = left < kBlockRows ? left : kBlockRows;
    b.row = b.head * item_.num_places() + b.first;
    const i64 tile_panels = tiles_[current_].num_panels;
    const Visible of_first = keys_of(row), of_last = keys_of(row + b.num - 1);
    b.num_panels = divide_up(of_last.end - key_, kTokensPerPanel);
    if (b.num_panels > tile_panels) b.num_panels = tile_panels;
    b.is_cut = of_last.begin > key_ || of_first.end < key_ + b.num_panels * kTokensPerPanel;
    return of_first.begin < key_ + tile_panels * kTokensPerPanel && of_last.end > key_;
  }

  void add_keys(const Block& b) {
    take_scales(b, tiles_[current_].key_scales);
    for_rows(b.num, [&](auto rows, i64 row) { score<decltype(rows)>(b, row); });
  }

  void weigh(const Block& b) {
    take_scales(b, tiles_[current_].value_scales);
    Visible visible[kBlockRows];
    for (i64 r = 0; b.is_cut && r < b.num; ++r) {
      const Visible keys = keys_of(item_.first_row + b.first + r);
      visible[r] = {keys.begin - key_, keys.end - key_};
    }
    for (i64 r = 0; r < b.num; r += kLanes) {
      const i64 row = b.row + r, left = b.num - r;
      softmax_.weigh(b.place + r, {left < kLanes ? left : kLanes, running_.maxima + row,
                                   running_.totals + row, factors_ + row, scales_, b.num_panels,
                                   b.is_cut ? visible + r : nullptr});
    }
  }

  void add_values(const Block& b) {
    for_rows(b.num, [&](auto rows, i64 row) { add_values<decltype(rows)>(b, row); });
  }

  void take_scales(const Block& b, const float* const* of_tile) {
    const bool is_whole =
        key_ >= item_.first_key && key_ + b.num_panels * kTokensPerPanel <= item_.end_key;
    scales_ = of_tile;
    if (is_whole && b.head == 0) return;
    scales_ = block_scales_;
    for (i64 i = 0; i < b.num_panels; ++i) {
      block_scales_[i] = of_tile[i] + b.head * kTokensPerPanel;
      if (is_whole) continue;
      block_scales_[i] = own_scales(block_scales_[i], key_ + i * kTokensPerPanel, cut_scales_[i]);
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

  Visible keys_of(i64 row) const { return s_.keys_of(row / g_.group, a_.sliding_window); }

  // So many rows meet a panel, then so many while it is in a first-level cache; each fetch so many lines
  // for eight words.
  template <int First, int Second, int Lines>
  struct Rows {
    static constexpr int kFirst = First, kSecond = Second, kLines = Lines;
    static constexpr i64 kTimes = Second > 0 ? 2 : 1;  // that a panel is met
  };

  // body(Rows, the first of them in the block): as many at a time as there are registers for. Of three
  // times, as blocks of a prompt need, two together would take 2 % longer than one after the other.
  template <class Body>
  static void for_rows(i64 num, Body body) {
    const i64 num_parts = divide_up(num, kPackedRows);
    if (num_parts == 2) return two_parts(num, body);
    for (i64 part = 0; part < num_parts; ++part) {
      const i64 row = part * num / num_parts, end = (part + 1) * num / num_parts;
      with_number<kPackedRows>(end - row, [&](auto first) {
        if (num_parts == 1) return body(Rows<first, 0, kManyLines>(), row);
        body(Rows<first, 0, kFewLines>(), row);
      });
    }
  }

  template <class Body>
  static void two_parts(i64 num, Body body) {
    with_number<kPackedRows>(num / 2, [&](auto first) {
      constexpr int kNext = first < kPackedRows ? first + 1 : kPackedRows;
      if (num == 2 * first) return body(Rows<first, first, kFewLines>(), 0);
      body(Rows<first, kNext, kFewLines>(), 0);
    });
  }

  // body(how many as a type, their words, which is the first): of the words of all, one part after the other.
  template <class R, class Body>
  static __attribute__((always_inline)) void for_parts(WordsArgs& words, Body body) {
    body(std::integral_constant<int, R::kFirst>(), words, 0);
    if constexpr (R::kSecond > 0) {
      const std::uint32_t* first = words.x;
      words.x += R::kFirst * words.row_size;
      body(std::integral_constant<int, R::kSecond>(), words, R::kFirst);
      words.x = first;
    }
  }

  template <class R>
  __attribute__((noinline)) void score(const Block& b, i64 row) {
    const i64 num_pieces = row_words_ / kWordsAtOnce;
    WordsArgs words = {queries_ + (b.row + row) * row_words_, row_words_, num_pieces,
                       fetcher_.take(b.num_panels * num_pieces * R::kTimes)};
    for (i64 p = 0; p < b.num_panels; ++p) {
      for_parts<R>(words, [&](auto num, WordsArgs& a, i64 part) __attribute__((always_inline)) {
        score_panel<num, R::kLines>(b, a, p, row + part);
      });
    }
  }

  template <int Num, int Lines>
  __attribute__((always_inline)) void score_panel(const Block& b, WordsArgs& a, i64 p, i64 row) {
    vi total[Num][kPanelVectors];
    multiply_words<Lines>(total, a, tiles_[current_].keys[p] + b.head * panel_bytes() / 4);
    a.ahead = a.ahead.behind(a.num);
    float* scores = softmax_.scores(b.place + row) + p * kTokensPerPanel;
    for_sums(total, [&](int r, int v, vf sum) __attribute__((always_inline)) {
      const vf scale = load(scales_[p] + v * kLanes, Whole{});
      store(scores + r * kScoreStride + v * kLanes, sum * scale, Whole{});
    });
  }

  template <class R>
  __attribute__((noinline)) void add_values(const Block& b, i64 row) {
    const i64 num_columns = g_.head_dim / kPanel;
    WordsArgs words = {softmax_.weights(b.place + row), kWeightStride, b.num_panels,
                       fetcher_.take(b.num_panels * num_columns * R::kTimes)};
    for (i64 column = 0; column < num_columns; ++column) {
      for_parts<R>(words, [&](auto num, WordsArgs& a, i64 part) __attribute__((always_inline)) {
        add_column<num, R::kLines>(b, a, column, row + part);
      });
    }
  }

  template <int Num, int Lines>
  __attribute__((always_inline)) void add_column(const Block& b, WordsArgs& a, i64 column, i64 row) {
    const i64 stride = g_.padded_dim, place = b.place + row;
    const float *scales = softmax_.scales(place), *rescales = softmax_.rescales(place);
    float* out = running_.rows + (b.row + row) * stride + column * kPanel;
    vi total[Num][kPanelVectors];
    multiply_words<Lines>(total, a, tiles_[current_].values,
                          b.head * panel_bytes() + column * kBytesAtOnce);
    a.ahead = a.ahead.behind(a.num);
    for_sums(total, [&](int r, int v, vf sum) __attribute__((always_inline)) {
      float* to = out + r * stride + v * kLanes;
      store(to, load(to, Whole{}) * splat(rescales[r]) + sum * splat(scales[r]), Whole{});
    });
  }

  // body(row, vector, sum as floats).
  template <int Num, class Body>
  static __attribute__((always_inline)) void for_sums(const vi (&total)[Num][kPanelVectors], Body body) {
    unrolled<Num>([&](auto r) __attribute__((always_inline)) {
      unrolled<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
        body(r, v, __builtin_convertvector(total[r][v], vf));
      });
    });
  }

  const AttentionArgs& a_;
  const Item& item_;
  const Item* next_;
  const Geometry g_;
  const Sequence s_;
  const i64 row_words_, head_blocks_, blocks_at_once_;
  IntegersKept& kept_;
  PanelFetcher& fetcher_;
  std::uint32_t* queries_;
  float* factors_;
  IntegerSoftmax<T> softmax_;
  Running running_;
  PanelTile tiles_[2];
  int current_ = 0;
  i64 next_heads_ = 0;            // of the next tile
  i64 key_ = 0;                   // a tile's first
  Block blocks_[kMostBlocks];
  i64 num_blocks_ = 0;
  const float* const* scales_;    // of each panel's keys, or values, of the block's head
  const float* block_scales_[kTilePanels];
  float cut_scales_[kTilePanels][kTokensPerPanel];
};
