// One token of each row, drawn as its parameters say; kernels/reference/sample.py defines it.
// Included by each level_*.cpp after simd.h; see there.
//
// Weights are whole numbers, so that sums are the same in any order. A cut is a least logit; it is
// found by halving the range of integers that are in the order of the floats. Only tokens that no cut
// leaves out for sure are looked at again and again: mostly few.

constexpr double kOne = 1099511627776.0;  // 2^40: the weight of the most likely token
constexpr i64 kSumBlock = 256;            // weights that are added up together
constexpr float kLowest = -3.402823466e38f;

typedef float vfh __attribute__((vector_size(2 * LANES)));
typedef double vd __attribute__((vector_size(4 * LANES)));
typedef i64 vl __attribute__((vector_size(4 * LANES)));

// A sum of shares of the most likely token's weight, as whole weights.
class Weight {
 public:
  void add(const float* shares) {
    for (int half = 0; half < 2; ++half) {
      const vd wide = __builtin_convertvector(load_raw<vfh>(shares + half * kLanes / 2, Whole{}), vd);
      const vd magic = vd{} + 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
      sums_[half] += (vl)(wide * kOne + magic) - (vl)magic;
    }
  }

  i64 total() const {
    i64 total = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) total += sums_[0][lane] + sums_[1][lane];
    return total;
  }

 private:
  vl sums_[2] = {};
};

inline i64 whole_weight(float share) {
  alignas(64) float lanes[kLanes] = {share};
  Weight weight;
  weight.add(lanes);
  return weight.total();
}

// Integers in the order of floats, without `kAbsent` lowest bits, which T does not have.
template <class T>
struct Order {
  static constexpr int kAbsent = std::is_same_v<T, bf16> ? 16 : 0;

  static i64 place(float x) {
    i32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits >= 0 ? bits : bits ^ 0x7fffffff) >> kAbsent;
  }

  static float at(i64 place) {
    const i32 key = i32(std::uint32_t(place) << kAbsent);
    const i32 bits = key >= 0 ? key : key ^ 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // The largest float of [least, most] that is `accepted`, as all below it are; else `least`.
  template <class Accepted>
  static float last(float least, float most, Accepted accepted) {
    i64 low = place(least), high = place(most);
    while (low < high) {
      const i64 middle = low + (high - low + 1) / 2;
      if (accepted(at(middle))) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return at(low);
  }
};

// Calls body(index, vector) for a row, past whose end are numbers `behind`.
template <class T, class Body>
inline void for_row(const T* row, i64 size, float behind, Body body) {
  for_lanes(size, [&](i64 i, auto extent) __attribute__((always_inline)) {
    vf x = load(row + i, extent);
    if constexpr (std::is_same_v<decltype(extent), Part>) {
      for (i64 lane = extent.count; lane < kLanes; ++lane) x[lane] = behind;
    }
    body(i, x);
  });
}

// A bit for each lane of a mask.
inline unsigned bits_of(vi mask) {
#if LANES == 16 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif LANES == 8 && defined(__AVX__)
  return _mm256_movemask_ps((__m256)mask);
#else
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= unsigned(mask[lane] != 0) << lane;
  return bits;
#endif
}

// Tokens that may be drawn, in the order of their ids, up to a whole vector with shares of 0.
struct Candidates {
  float *logits, *shares;
  i32* ids;
  i64* sums;  // of blocks
  i64 size = 0;

  static std::size_t num_bytes(i64 size) { return capacity(size) * 12 + blocks(size) * 8; }

  Candidates(void* memory, i64 size)
      : logits(reinterpret_cast<float*>(static_cast<i64*>(memory) + blocks(size))),
        shares(logits + capacity(size)), ids(reinterpret_cast<i32*>(shares + capacity(size))),
        sums(static_cast<i64*>(memory)) {}

  // Of a vector, those lanes whose bit is set.
  void add(vf x, vf share, i64 first_id, unsigned bits) {
    if (bits == (2u << (kLanes - 1)) - 1) return add_all(x, share, first_id);
    alignas(64) float all_logits[kLanes], all_shares[kLanes];
    store(all_logits, x, Whole{});
    store(all_shares, share, Whole{});
    for (; bits; bits &= bits - 1, ++size) {
      const int lane = __builtin_ctz(bits);
      logits[size] = all_logits[lane];
      shares[size] = all_shares[lane];
      ids[size] = i32(first_id + lane);
    }
  }

  void add_all(vf x, vf share, i64 first_id) {
    store(logits + size, x, Whole{});
    store(shares + size, share, Whole{});
    for (int lane = 0; lane < kLanes; ++lane) ids[size + lane] = i32(first_id + lane);
    size += kLanes;
  }

  void fill_up() {
    for (i64 i = size; i < round_up(size, kLanes); ++i) {
      logits[i] = kLowest;
      shares[i] = 0;
    }
  }

  // The weight of those whose logit is at least `least`.
  i64 weight_from(float least) const {
    Weight weight;
    alignas(64) float kept[kLanes];
    for (i64 i = 0; i < size; i += kLanes) {
      const vf x = load(logits + i, Whole{});
      store(kept, select(x >= splat(least), load(shares + i, Whole{}), vf{}), Whole{});
      weight.add(kept);
    }
    return weight.total();
  }

  float least_logit() const {
    vf least = splat(-kLowest);
    for_row(logits, size, -kLowest, [&](i64, vf x) { least = select(x < least, x, least); });
    return -maximum(-least);
  }

  void leave_out_below(float least) {
    for (i64 i = 0; i < size; i += kLanes) {
      const vf x = load(logits + i, Whole{});
      store(shares + i, select(x >= splat(least), load(shares + i, Whole{}), vf{}), Whole{});
    }
  }

  // The id at which the weights add up to more than `uniform` times all of them.
  i32 draw(double uniform) {
    i64 total = 0;
    for (i64 i = 0, block = 0; i < size; ++block) {
      Weight weight;
      const i64 end = i + kSumBlock < size ? i + kSumBlock : size;
      for (; i < end; i += kLanes) weight.add(shares + i);
      sums[block] = weight.total();
      total += sums[block];
    }
    i64 left = i64(uniform * double(total));
    left = left < total ? left : total - 1;
    i64 block = 0;
    while (left >= sums[block]) left -= sums[block++];
    for (i64 i = block * kSumBlock;; ++i) {
      left -= whole_weight(shares[i]);
      if (left < 0) return ids[i];
    }
  }

 private:
  static i64 capacity(i64 size) { return round_up(size, kSumBlock) + kLanes; }
  static i64 blocks(i64 size) { return divide_up(size, kSumBlock) + 1; }
};

template <class T>
class RowDraw {
 public:
  RowDraw(const T* row, i64 size, const Draw& draw, float most, void* memory)
      : row_(row), size_(size), draw_(draw), most_(most), candidates_(memory, size) {}

  i32 token() {
    const float least = least_of_top_k();
    const i64 total = gather(least);
    if (draw_.top_p < 1) candidates_.leave_out_below(least_of_top_p(total));
    return candidates_.draw(draw_.uniform);
  }

 private:
  float least_of_top_k() const {
    if (draw_.top_k <= 0 || draw_.top_k >= size_) return kLowest;
    return Order<T>::last(kLowest, most_, [&](float least) {
      vi count = {};
      for_row(row_, size_, -kInfinity, [&](i64, vf x) { count -= x >= splat(least); });
      i64 total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
      return total >= draw_.top_k;
    });
  }

  // The candidates; returns the weight of all that top-k keeps.
  i64 gather(float least) {
    const vf scale = splat(kLog2E / draw_.temperature);
    const vf fewest = splat(least_share());
    Weight weight;
    alignas(64) float shares[kLanes];
    for_row(row_, size_, -kInfinity, [&](i64 i, vf x) {
      const vf all = exp2_negative((x - splat(most_)) * scale);
      const vf share = select(x >= splat(least), all, vf{});
      store(shares, share, Whole{});
      weight.add(shares);
      const vi is_candidate = (share >= fewest) & (share > vf{});
      if (const unsigned bits = bits_of(is_candidate)) candidates_.add(x, share, i, bits);
    });
    candidates_.fill_up();
    return weight.total();
  }

  // What has less is left out by min-p, or is sure to be by top-p: all such together are less than
  // half of what that leaves out.
  float least_share() const {
    const float never = draw_.top_p < 1 ? (1 - draw_.top_p) / (2 * float(size_)) : 0;
    return draw_.min_p > never ? draw_.min_p : never;
  }

  float least_of_top_p(i64 total) const {
    const double wanted = double(draw_.top_p) * double(total);
    return Order<T>::last(candidates_.least_logit(), most_, [&](float least) {
      return double(candidates_.weight_from(least)) >= wanted;
    });
  }

  const T* row_;
  const i64 size_;
  const Draw& draw_;
  const float most_;
  Candidates candidates_;
};

// Whether a row is finite throughout, and its largest number.
template <class T>
bool find_largest(const T* row, i64 size, float& largest) {
  vf most = splat(-kInfinity), poison = {};
  const float first = load(row, Part{1})[0];
  for_row(row, size, first, [&](i64, vf x) {
    most = maximum(most, x);
    poison += x - x;  // not a number where x is not finite
  });
  largest = maximum(most);
  return sum(poison) == 0;
}

template <class T>
i32 first_place_of(const T* row, i64 size, float number) {
  for (i64 i = 0; i < size; i += kLanes) {
    const vf x = i + kLanes <= size ? load(row + i, Whole{}) : load(row + i, Part{size - i});
    if (const unsigned bits = bits_of(x == splat(number))) return i32(i + __builtin_ctz(bits));
  }
  return -1;
}

template <class T>
bool sample(const SampleArgs& a) {
  bool has_memory = true;
  auto body = [&](i64 index) {
    const T* row = static_cast<const T*>(a.logits) + index * a.row_stride;
    const Draw& draw = a.draws[index];
    float most;
    if (!find_largest(row, a.size, most)) {
      a.out[index] = -1;
    } else if (!(draw.temperature > 0)) {
      a.out[index] = first_place_of(row, a.size, most);
    } else {
      void* memory = scratch(Candidates::num_bytes(a.size));
      if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
      a.out[index] = RowDraw<T>(row, a.size, draw, most, memory).token();
    }
  };
  parallel(a.num_rows, grain_for(a.size), body);
  return has_memory;
}
