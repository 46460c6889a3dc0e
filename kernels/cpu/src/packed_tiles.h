// Rows of bf16 times a packed weight matrix on the matrix unit.
// Included by each level_*.cpp after packed.h; see there.
//
// Whole tiles of words along the summed dimension go there, the words after them through vectors.

#if HAS_AMX

// Sums of RowTiles x 16 rows and some panels; what is past the last row comes out as it may.
template <int RowTiles, int Panels>
void multiply_tile_block(const TileArgs<bf16>& t, float* sums, i64 stride, bool is_first) {
  static_assert(RowTiles * Panels <= 4, "the sums take half of the tiles");
  const i64 row_bytes = t.row_size * 4, sum_bytes = stride * 4;
  const auto for_sums = [&](auto body) __attribute__((always_inline)) {
    unrolled<RowTiles>([&](auto r) __attribute__((always_inline)) {
      unrolled<Panels>([&](auto p) __attribute__((always_inline)) {
        body(std::integral_constant<int, r * Panels + p>(), sums + r * kTile * stride + p * kPanel);
      });
    });
  };
  for_sums([&](auto tile, float* at) __attribute__((always_inline)) {
    is_first ? tile_zero<tile>() : tile_load<tile>(at, sum_bytes);
  });
  const i64 words_per_line = kLine / t.ahead_step;
  for (i64 word = 0; word < t.num_words; word += kTile) {
    unrolled<RowTiles>([&](auto r) __attribute__((always_inline)) {
      tile_load<4 + r>(t.x + r * kTile * t.row_size + word, row_bytes);
    });
    unrolled<Panels>([&](auto p) __attribute__((always_inline)) {
      const i64 panel = p * t.panel_words;
      for (i64 i = 0; i < kTile; i += words_per_line) {
        __builtin_prefetch(t.ahead + panel * 4 + (word + i) * t.ahead_step, 0, 2);
      }
      tile_load<6 + p % 2>(t.weight + panel + word * kPanel, kTileRowBytes);
      unrolled<RowTiles>([&](auto r) __attribute__((always_inline)) {
        tile_multiply_add<r * Panels + p, 4 + r, 6 + p % 2>();
      });
    });
  }
  for_sums([&](auto tile, float* at) __attribute__((always_inline)) {
    tile_store<tile>(at, sum_bytes);
  });
}

template <int RowTiles>
void multiply_in_tiles(TileArgs<bf16> t, i64 num_panels, float* sums, i64 stride, bool is_first) {
  constexpr int kPanels = 4 / RowTiles;
  for (i64 panels; num_panels > 0; num_panels -= panels) {
    panels = num_panels < kPanels ? 1 : kPanels;
    panels == 1 ? multiply_tile_block<RowTiles, 1>(t, sums, stride, is_first)
                : multiply_tile_block<RowTiles, kPanels>(t, sums, stride, is_first);
    t.weight += panels * t.panel_words;
    t.ahead += panels * t.panel_words * 4;
    sums += panels * kPanel;
  }
}

inline void multiply_rows(i64 num_rows, TileArgs<bf16> t, i64 num_panels, float* sums, i64 stride,
                          bool is_first) {
  const i64 num_words = t.num_words;
  t.num_words = num_words / kTile * kTile;
  if (t.num_words > 0) {
    num_rows <= kTile ? multiply_in_tiles<1>(t, num_panels, sums, stride, is_first)
                      : multiply_in_tiles<2>(t, num_panels, sums, stride, is_first);
  }
  if (t.num_words == num_words) return;
  t.x += t.num_words;
  t.weight += t.num_words * kPanel;
  is_first &= t.num_words == 0;
  t.num_words = num_words - t.num_words;
  for (i64 row = 0; row < num_rows; row += kPackedRows) {
    const i64 rows = num_rows - row < kPackedRows ? num_rows - row : kPackedRows;
    multiply_some(rows, t, num_panels, sums + row * stride, stride, is_first);
    t.x += rows * t.row_size;
  }
}

#endif
