// Scores of rows against a tile of a cache of 16-bit integers become weights, integers too.
// Included by each level_*.cpp after cache_panels.h; see there.
//
// All are bounded so that sums of products with values are exact in 32 bits: values are below 2^13, what
// a row's weights of a tile add up to is at most 2^18, all as magnitudes.

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

// kPanel numbers, times a factor, as integers.
template <class From>
inline void store_rounded(std::uint32_t* to, const From* from, vf factor) {
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

// Rows, kLanes at most: what they have gathered, and what they see of a tile.
struct SoftmaxRows {
  i64 num;
  float *maxima, *totals;            // so far
  const float* factors;              // of scores
  const float* const* value_scales;  // of each panel's tokens
  i64 num_panels;
  const Visible* visible;            // of each row, counted from the tile's first key; null: all
};

// Scores and weights of some rows, each with a place.
template <class T>
class IntegerSoftmax {
 public:
  static i64 num_words(i64 num_places) { return num_places * (kScoreStride + kWeightStride + 2); }

  IntegerSoftmax(std::uint32_t* memory, i64 num_places, PanelFetcher& fetcher)
      : scores_(reinterpret_cast<float*>(memory)), weights_(memory + num_places * kScoreStride),
        scales_(reinterpret_cast<float*>(weights_ + num_places * kWeightStride)),
        rescales_(scales_ + num_places), fetcher_(fetcher) {}

  float* scores(i64 place) const { return scores_ + place * kScoreStride; }
  const std::uint32_t* weights(i64 place) const { return weights_ + place * kWeightStride; }
  // What a weight's integer stands for, and what has been gathered before is multiplied with.
  const float* scales(i64 place) const { return scales_ + place; }
  const float* rescales(i64 place) const { return rescales_ + place; }

  // Turns the scores of rows, from `place` on, into weights.
  void weigh(i64 place, const SoftmaxRows& t) {
    vf rows[kLanes], most[kLanes], total[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = i < t.num ? highest(place + i, t, i) : splat(-kInfinity);
    const vf factor = load(t.factors, Whole{});
    const Shift shift(load(t.maxima, Whole{}), maxima(rows), factor);
    store(t.maxima, shift.maxima, Whole{});
    store(rescales_ + place, shift.rescale, Whole{});
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = most[i] = total[i] = vf{};
      if (i < t.num) {
        exponentials(place + i, t, factor[i], shift.shift[i], rows[i], most[i], total[i]);
      }
    }
    store(t.totals, load(t.totals, Whole{}) * shift.rescale + sums(rows), Whole{});
    const IntegerScales scales(maxima(most), sums(total) * splat(1 / kLargestRowSum));
    store(scales_ + place, scales.scale, Whole{});
    for (int i = 0; i < t.num; ++i) round_weights(place + i, t.num_panels, scales.inverse[i]);
  }

 private:
  vf highest(i64 place, const SoftmaxRows& t, int row) {
    float* scores = this->scores(place);
    if (t.visible) mask(scores, t.num_panels * kTokensPerPanel, t.visible[row]);
    vf most[kPanelVectors];
    for (vf& part : most) part = splat(-kInfinity);
    for_vectors(t.num_panels, [&](i64 j, int v) __attribute__((always_inline)) {
      most[v] = maximum(most[v], load(scores + j, Whole{}));
    });
    for (int v = 1; v < kPanelVectors; ++v) most[0] = maximum(most[0], most[v]);
    return most[0];
  }

  // body(key, which vector of its panel).
  template <class Body>
  void for_vectors(i64 num_panels, Body body) {
    fetcher_.fetch(num_panels);
    for (i64 panel = 0; panel < num_panels; ++panel) {
      unrolled<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
        body(panel * kTokensPerPanel + v * kLanes, v);
      });
    }
  }

  static void mask(float* scores, i64 num_keys, Visible visible) {
    for (i64 j = 0; j < visible.begin && j < num_keys; ++j) scores[j] = -kInfinity;
    for (i64 j = visible.end > 0 ? visible.end : 0; j < num_keys; ++j) scores[j] = -kInfinity;
  }

  __attribute__((noinline)) void exponentials(i64 place, const SoftmaxRows& t, float factor, float shift,
                                             vf& sum, vf& most, vf& total) {
    float* scores = this->scores(place);
    vf sums[kPanelVectors] = {}, highest[kPanelVectors] = {}, totals[kPanelVectors] = {};
    const vf factors = splat(factor), shifts = splat(shift);
    for_vectors(t.num_panels, [&](i64 j, int v) __attribute__((always_inline)) {
      const vf weight = exp2_negative<T>(load(scores + j, Whole{}) * factors - shifts);
      const float* scales = t.value_scales[j / kTokensPerPanel] + v * kLanes;
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

  void round_weights(i64 place, i64 num_panels, float inverse) {
    const float* scores = this->scores(place);
    std::uint32_t* to = weights_ + place * kWeightStride;
    const vf factor = splat(inverse);
    fetcher_.fetch(num_panels);
    for (i64 panel = 0; panel < num_panels; ++panel) {
      store_rounded(to + panel * kWordsAtOnce, scores + panel * kTokensPerPanel, factor);
    }
  }

  float* scores_;
  std::uint32_t* weights_;
  float *scales_, *rescales_;
  PanelFetcher& fetcher_;
};
