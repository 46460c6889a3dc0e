// Small matrix products C += A B over 32-bit words, the core of attention.
// Included by each level_*.cpp after simd.h; see there.
//
// A word is one float, or, where the level multiplies pairs, two neighbouring bf16 along the summed
// dimension. A's words are broadcast, B's are read as vectors, so nothing is summed across lanes.

template <class T>
struct Words {
  static constexpr bool kPairs = false;
  static constexpr int kElements = 1;
};

#if HAS_BF16_DOT
template <>
struct Words<bf16> {
  static constexpr bool kPairs = true;
  static constexpr int kElements = 2;
};
#endif

// Whether a vector is a register that FMA instructions take.
#if defined(__FMA__) && (LANES == 8 || (LANES == 16 && defined(__AVX512F__)))
#define HAS_VECTOR_FMA 1
#else
#define HAS_VECTOR_FMA 0
#endif

// Registers hold kMaxRows x kMaxVectors sums, kMaxVectors of B and a broadcast of A.
constexpr int kMaxRows = 6;
constexpr int kMaxVectors = LANES == 16 ? 4 : 2;

template <class T, class Extent>
inline vu load_words(const T* from, Extent extent) {
  if constexpr (Words<T>::kPairs) {
    return load_raw<vu>(from, extent);
  } else {
    return (vu)load(from, extent);
  }
}

template <bool Pairs>
inline vf multiply_add(vf total, vu a, vu b) {
#if HAS_BF16_DOT && !defined(PILOTLIGHT_EMULATE)
  if constexpr (Pairs) return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#elif HAS_BF16_DOT
  if constexpr (Pairs) {
    const vu odd = vu{} + 0xffff0000u;
    return total + (vf)(a & odd) * (vf)(b & odd) + (vf)(a << 16) * (vf)(b << 16);
  }
#endif
  return total + (vf)a * (vf)b;
}

// total += a * (the floats at `b`); see add_row.
inline __attribute__((always_inline)) void add_product(vf& total, vu a, const std::uint32_t* b) {
#if HAS_VECTOR_FMA
  asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(a), "m"(*reinterpret_cast<const vu*>(b)));
#else
  total = multiply_add<false>(total, a, load_raw<vu>(b, Whole{}));
#endif
}

inline vu splat_word(const void* from) {
  std::uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return vu{} + word;
}

#if HAS_BF16_DOT

// total += pairs * (the word at `word`, broadcast).
inline __attribute__((always_inline)) void add_pairs(vf& total, vu pairs, const void* word) {
#if !defined(PILOTLIGHT_EMULATE)
  struct Word {
    std::uint32_t bits;
  } __attribute__((packed, may_alias));
  asm("vdpbf16ps %2%{1to16%}, %1, %0"
      : "+v"(total) : "v"(pairs), "m"(*static_cast<const Word*>(word)));
#else
  total = multiply_add<true>(total, pairs, splat_word(word));
#endif
}

#endif

struct Matrix {
  std::uint32_t* words;  // on the A side perhaps a caller's bf16, so read as bytes
  i64 stride;            // words from row to row
};

// total[v] += (the word at `left`, broadcast) * right[v].
template <bool Pairs, int Vectors>
inline __attribute__((always_inline)) void add_row(vf (&total)[Vectors], const void* left,
                                                   const vu (&right)[Vectors]) {
#if HAS_VECTOR_FMA
  // The registers are just enough, if they are used in this order. GCC's own order, and its choice of
  // instructions that overwrite a factor, puts sums into memory and costs a third of the speed.
  if constexpr (Vectors % 2 == 0 && !Pairs) {
    struct Word {
      std::uint32_t bits;
    } __attribute__((packed, may_alias));
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v += 2) {
      vf factor;
      asm("vbroadcastss %3, %2\n\t"
          "vfmadd231ps %4, %2, %0\n\t"
          "vfmadd231ps %5, %2, %1"
          : "+v"(total[v]), "+v"(total[v + 1]), "=&v"(factor)
          : "m"(*static_cast<const Word*>(left)), "v"(right[v]), "v"(right[v + 1]));
    }
    return;
  }
#endif
  const vu factor = splat_word(left);
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) total[v] = multiply_add<Pairs>(total[v], factor, right[v]);
}

// The right side: columns in panels of kColumns, or of kLanes where fewer are left, so that what is
// read together lies together.
constexpr i64 kColumns = kMaxVectors * kLanes;

struct Panels {
  std::uint32_t* words;
  i64 num_columns, num_steps;  // num_columns: a multiple of kLanes

  i64 width(i64 column) const {
    return column < num_columns / kColumns * kColumns ? kColumns : kLanes;
  }
  std::uint32_t* at(i64 step, i64 column) const {
    const i64 size = width(column), first = column / size * size;
    return words + first * num_steps + step * size + column - first;
  }
};

struct Sums {
  float* values;
  i64 stride;
};

template <bool Pairs, int Rows, int Vectors>
inline void multiply_block(Matrix a, Matrix b, i64 num_steps, Sums c, bool is_first) {
  vf total[Rows][Vectors] = {};
  if (!is_first) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        total[r][v] = load(c.values + r * c.stride + v * kLanes, Whole{});
      }
    }
  }
  const i64 stride = Vectors == kMaxVectors ? kColumns : b.stride;
  for (i64 step = 0; step < num_steps; ++step) {
    vu right[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      right[v] = load_raw<vu>(b.words + step * stride + v * kLanes, Whole{});
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) add_row<Pairs>(total[r], a.words + r * a.stride + step, right);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      store(c.values + r * c.stride + v * kLanes, total[r][v], Whole{});
    }
  }
}

template <bool Pairs, int Vectors, int Rows = kMaxRows>
inline void multiply_rows(Matrix a, i64 num_rows, Matrix b, i64 num_steps, Sums c, bool is_first) {
  if constexpr (Rows > 0) {
    if (num_rows == Rows) return multiply_block<Pairs, Rows, Vectors>(a, b, num_steps, c, is_first);
    multiply_rows<Pairs, Vectors, Rows - 1>(a, num_rows, b, num_steps, c, is_first);
  }
}

// Some vectors of a panel's columns meet all rows, while a first-level cache holds them. Rows are shared
// out evenly: a block of one row would wait for its own sums.
template <bool Pairs, int Vectors = kMaxVectors>
void multiply_panel(Matrix a, i64 num_rows, Matrix b, i64 num_vectors, i64 num_steps, Sums c,
                    bool is_first) {
  if constexpr (Vectors > 1) {
    if (num_vectors < Vectors) {
      return multiply_panel<Pairs, Vectors - 1>(a, num_rows, b, num_vectors, num_steps, c, is_first);
    }
  }
  const i64 num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  for (i64 block = 0; block < num_blocks; ++block) {
    const i64 row = block * num_rows / num_blocks;
    const i64 rows = (block + 1) * num_rows / num_blocks - row;
    multiply_rows<Pairs, Vectors>({a.words + row * a.stride, a.stride}, rows, b, num_steps,
                                  {c.values + row * c.stride, c.stride}, is_first);
  }
}

// C[num_rows, num_columns] += A[num_rows, num_steps] B[num_steps, num_columns], or = where nothing is
// there yet, by the first steps and columns of B; num_columns is a multiple of kLanes.
template <bool Pairs>
void multiply(Matrix a, i64 num_rows, Panels b, i64 num_columns, i64 num_steps, Sums c,
              bool is_first) {
  for (i64 column = 0, width; column < num_columns; column += width) {
    width = b.width(column);
    const i64 left = num_columns - column, some = left < width ? left : width;
    multiply_panel<Pairs>(a, num_rows, {b.at(0, column), width}, some / kLanes, num_steps,
                          {c.values + column, c.stride}, is_first);
  }
}

// Writes the words of to.num_columns rows as columns. Rows that are null become zeros.
template <class T>
void pack_transposed(const T* const* rows, Panels to) {
  for (i64 row = 0; row < to.num_columns; row += kLanes) {
    for_lanes(to.num_steps, [&](i64 word, auto extent) {
      vu block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* from = rows[row + i];
        block[i] = from ? load_words(from + word * Words<T>::kElements, extent) : vu{};
      }
      transpose(block);
      const i64 left = to.num_steps - word;
      for (int i = 0; i < kLanes && i < left; ++i) {
        store_raw(to.at(word + i, row), block[i], Whole{});
      }
    });
  }
}
