// What the machine can do at best, for measurements: reading memory, multiplying in registers.
// Included by each level_*.cpp after tiles.h; see there.

constexpr i64 kReadPiece = 128 << 10;
constexpr int kLimitSums = 12;  // more than the multipliers have in flight

// Adds up memory, on all threads; the sums are written so that no compiler leaves the reading out.
inline bool read_memory(const LimitArgs& a) {
  auto body = [&](i64 piece) {
    const char* from = static_cast<const char*>(a.memory) + piece * kReadPiece;
    vf total[8] = {};
    for (i64 i = 0; i < kReadPiece; i += sizeof total) {
      unrolled<8>([&](auto k) __attribute__((always_inline)) {
        total[k] += load(reinterpret_cast<const float*>(from + i) + k * kLanes, Whole{});
      });
    }
    unrolled<8>([&](auto k) __attribute__((always_inline)) { total[0] += total[k]; });
    a.out[piece % a.num_outs] = sum(total[0]);
  };
  parallel(a.amount / kReadPiece, 1, body);
  return true;
}

#if HAS_AMX

inline void multiply_tiles_only(i64 amount) {
  const TileSession session;
  (void)session;
  alignas(64) const char zeros[kTile * kTileRowBytes] = {};
  tile_load<6>(zeros, kTileRowBytes);
  tile_load<7>(zeros, kTileRowBytes);
  unrolled<4>([](auto k) __attribute__((always_inline)) { tile_zero<k>(); });
  constexpr i64 kOperations = 4 * kTile * kTile * kTile * 2 * 2;
  for (i64 step = 0; step < amount / kOperations; ++step) {
    unrolled<4>([](auto k) __attribute__((always_inline)) { tile_multiply_add<k, 6, 7>(); });
  }
}

#endif

inline void multiply_integers_only(const LimitArgs& a, i64 thread) {
  vi total[kLimitSums];  // all different, and each multiplies itself, or one product would do
  unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) { total[k] = vi{} + int{k}; });
  const vu factor = (vu)splat(a.out[0]);
  constexpr i64 kOperations = kLimitSums * kLanes * 2 * 2;
  for (i64 step = 0; step < a.amount / kOperations; ++step) {
    unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) {
      add_integers<kLimitSums>(total[k], factor, (vu)total[k]);
    });
  }
  unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) { total[0] += total[k]; });
  a.out[1 + thread % (a.num_outs - 1)] = sum(__builtin_convertvector(total[0], vf));
}

// `amount` multiplications and additions on each thread, as the level multiplies T.
template <class T>
bool multiply_only(const LimitArgs& a) {
  auto body = [&](i64 thread) {
    if constexpr (std::is_same_v<T, Int16>) return multiply_integers_only(a, thread);
#if HAS_AMX
    if constexpr (Words<T>::kPairs) return multiply_tiles_only(a.amount);
#endif
    vf total[kLimitSums];  // all different, or the compiler keeps one for all
    unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) {
      total[k] = splat(a.out[0] + k);
    });
    const vf factor = splat(a.out[0]);
    constexpr i64 kOperations = kLimitSums * kLanes * Words<T>::kElements * 2;
    for (i64 step = 0; step < a.amount / kOperations; ++step) {
      unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) {
        if constexpr (Words<T>::kPairs) {
          total[k] = multiply_add<true>(total[k], (vu)factor, (vu)factor);
        } else {
          total[k] = total[k] * factor + factor;
        }
      });
    }
    unrolled<kLimitSums>([&](auto k) __attribute__((always_inline)) { total[0] += total[k]; });
    a.out[1 + thread % (a.num_outs - 1)] = sum(total[0]);
  };
  parallel(num_threads(), 1, body);
  return true;
}
