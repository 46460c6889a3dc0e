// The matrix unit: tiles of 16 rows of 64 bytes.
// Included by each level_*.cpp after tiles.h; see there.
//
// A tile holds 16 rows of x, 16 words each; or 16 words of a panel; or 16 x 16 sums. All have the
// same shape, so a thread configures its tiles once. With PILOTLIGHT_EMULATE they are arrays.

#if HAS_AMX

constexpr i64 kTile = 16;  // rows of a tile, and words or sums in each
constexpr i64 kTileRowBytes = 64;

#ifdef PILOTLIGHT_EMULATE

struct EmulatedTile {
  std::uint32_t words[kTile][kTile];
};

inline EmulatedTile& emulated_tile(int number) {
  thread_local EmulatedTile tiles[8];
  return tiles[number];
}

struct TileSession {};

template <int Number>
inline void tile_zero() { emulated_tile(Number) = {}; }

template <int Number>
inline void tile_load(const void* from, i64 stride) {
  for (i64 row = 0; row < kTile; ++row) {
    std::memcpy(emulated_tile(Number).words[row], static_cast<const char*>(from) + row * stride,
                kTileRowBytes);
  }
}

template <int Number>
inline void tile_store(void* to, i64 stride) {
  for (i64 row = 0; row < kTile; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tile(Number).words[row],
                kTileRowBytes);
  }
}

template <int Sums, int Left, int Right>
inline void tile_multiply_add() {
  for (i64 row = 0; row < kTile; ++row) {
    vf total = load_raw<vf>(emulated_tile(Sums).words[row], Whole{});
    for (i64 word = 0; word < kTile; ++word) {
      const vu right = load_raw<vu>(emulated_tile(Right).words[word], Whole{});
      total = multiply_add<true>(total, splat_word(&emulated_tile(Left).words[row][word]), right);
    }
    store_raw(emulated_tile(Sums).words[row], total, Whole{});
  }
}

#else

// The tiles of this thread, for as long as it lives.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof shape == 64, "");
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int Number>
inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(Number)); }

template <int Number>
inline void tile_load(const void* from, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Number) : "memory");
}

template <int Number>
inline void tile_store(void* to, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Number) : "memory");
}

template <int Sums, int Left, int Right>
inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Left), "i"(Right));
}

#endif

#else

struct TileSession {};

#endif
