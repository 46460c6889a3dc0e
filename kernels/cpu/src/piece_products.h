// Products of panels of 16-bit integers that are all in a cache: eight words of rows at a time.
// Included by each level_*.cpp after packed_integers.h; see there.
//
// A panel may lie in pieces of eight words; and what each piece fetches is somewhere else, for later.

constexpr i64 kWordsAtOnce = 8;
constexpr i64 kBytesAtOnce = kWordsAtOnce * kPanel * 4;

// What pieces fetch: each from a place of its own, or all from the same.
struct Ahead {
  const char* const* places;
  i64 step_bytes;  // of `places`

  Ahead behind(i64 num_pieces) const {
    const auto* bytes = reinterpret_cast<const char*>(places) + num_pieces * step_bytes;
    return {reinterpret_cast<const char* const*>(bytes), step_bytes};
  }
};

struct WordsArgs {
  const std::uint32_t* x;  // the first row's
  i64 row_size;
  i64 num;  // of pieces
  Ahead ahead;
};

template <int Lines, int Rows>
inline __attribute__((always_inline)) void add_words(vi (&total)[Rows][kPanelVectors], const WordsArgs& a,
                                                     i64 index, const char* from) {
  const char* place = *a.ahead.behind(index).places;
  WordArgs at = {a.x + index * kWordsAtOnce, a.row_size,
                 reinterpret_cast<const std::uint32_t*>(from), place, Lines * kLine / kWordsAtOnce};
  for (i64 word = 0; word < kWordsAtOnce; ++word) add_word(total, at);
}

// total = the products of words that follow each other.
template <int Lines, int Rows>
inline __attribute__((always_inline)) void multiply_words(vi (&total)[Rows][kPanelVectors],
                                                          const WordsArgs& a,
                                                          const std::uint32_t* from) {
  std::memset(total, 0, sizeof total);
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (i64 i = 0; i < a.num; ++i) add_words<Lines>(total, a, i, bytes + i * kBytesAtOnce);
}

// total = the products of words in several places.
template <int Lines, int Rows>
inline __attribute__((always_inline)) void multiply_words(vi (&total)[Rows][kPanelVectors],
                                                          const WordsArgs& a,
                                                          const std::uint32_t* const* from,
                                                          i64 offset_bytes) {
  std::memset(total, 0, sizeof total);
  for (i64 i = 0; i < a.num; ++i) {
    add_words<Lines>(total, a, i, reinterpret_cast<const char*>(from[i]) + offset_bytes);
  }
}

#if LANES == 8 && defined(__AVX2__)

#define PILOTLIGHT_ADD_0(first, second, place) PILOTLIGHT_ADD(first, second, place)
#define PILOTLIGHT_ADD_1(first, second, place) PILOTLIGHT_ADD(first, second, "4" place)
#define PILOTLIGHT_ADD_2(first, second, place) PILOTLIGHT_ADD(first, second, "8" place)
#define PILOTLIGHT_ADD_3(first, second, place) PILOTLIGHT_ADD(first, second, "12" place)
#define PILOTLIGHT_ADD_4(first, second, place) PILOTLIGHT_ADD(first, second, "16" place)
#define PILOTLIGHT_ADD_5(first, second, place) PILOTLIGHT_ADD(first, second, "20" place)
#define PILOTLIGHT_ADD_6(first, second, place) PILOTLIGHT_ADD(first, second, "24" place)
#define PILOTLIGHT_ADD_7(first, second, place) PILOTLIGHT_ADD(first, second, "28" place)
#define PILOTLIGHT_FETCH_7_0
#define PILOTLIGHT_FETCH_7_1 "prefetcht0 (%[line])\n\t"
#define PILOTLIGHT_FETCH_7_2 "prefetcht0 64(%[line])\n\t"
#define PILOTLIGHT_FETCH_7_3 "prefetcht0 128(%[line])\n\t"
#define PILOTLIGHT_FETCH_7_4 "prefetcht0 192(%[line])\n\t"
#define PILOTLIGHT_FETCH_7_5 "prefetcht0 256(%[line])\n\t"
#define PILOTLIGHT_FETCH_7_6 "prefetcht0 320(%[line])\n\t"
#define PILOTLIGHT_FETCH_7_7 "prefetcht0 384(%[line])\n\t"
#define PILOTLIGHT_FETCH_4_0
#define PILOTLIGHT_FETCH_4_1 PILOTLIGHT_FETCH_7_1
#define PILOTLIGHT_FETCH_4_2
#define PILOTLIGHT_FETCH_4_3 PILOTLIGHT_FETCH_7_2
#define PILOTLIGHT_FETCH_4_4
#define PILOTLIGHT_FETCH_4_5 PILOTLIGHT_FETCH_7_3
#define PILOTLIGHT_FETCH_4_6
#define PILOTLIGHT_FETCH_4_7 PILOTLIGHT_FETCH_7_4
#define PILOTLIGHT_WORD(rows, index, fetch)                                                          \
  "vmovdqu 64*" #index "(%[at]), %%ymm12\n\t"                                                        \
  "vmovdqu 64*" #index "+32(%[at]), %%ymm13\n\t"                                                     \
  fetch##_##index                                                                                    \
  PILOTLIGHT_ROWS_##rows(PILOTLIGHT_ADD_##index)
// `enter` and `leave` find the words: in %[at].
#define PILOTLIGHT_WORDS(rows, fetch, enter, leave)                                                  \
  PILOTLIGHT_ROWS_##rows(PILOTLIGHT_CLEAR)                                                           \
  "test %[num], %[num]\n\t"                                                                          \
  "je 2f\n\t"                                                                                        \
  ".p2align 5\n"                                                                                     \
  "1:\n\t"                                                                                           \
  "mov (%[ahead]), %[line]\n\t"                                                                      \
  "add %[step], %[ahead]\n\t"                                                                        \
  enter                                                                                              \
  PILOTLIGHT_WORD(rows, 0, fetch) PILOTLIGHT_WORD(rows, 1, fetch)                                    \
  PILOTLIGHT_WORD(rows, 2, fetch) PILOTLIGHT_WORD(rows, 3, fetch)                                    \
  PILOTLIGHT_WORD(rows, 4, fetch) PILOTLIGHT_WORD(rows, 5, fetch)                                    \
  PILOTLIGHT_WORD(rows, 6, fetch) PILOTLIGHT_WORD(rows, 7, fetch)                                    \
  leave                                                                                              \
  "add $32, %[x]\n\t"                                                                                \
  "add $32, %[x3]\n\t"                                                                               \
  "dec %[num]\n\t"                                                                                   \
  "jne 1b\n"                                                                                         \
  "2:\n\t"                                                                                           \
  PILOTLIGHT_ROWS_##rows(PILOTLIGHT_STORE)
#define PILOTLIGHT_CHANGED                                                                           \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",  \
      "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory"
#define PILOTLIGHT_MULTIPLY_WORDS(rows, lines)                                                       \
  template <int Lines>                                                                               \
  inline __attribute__((always_inline)) std::enable_if_t<Lines == lines> multiply_words(             \
      vi (&total)[rows][2], const WordsArgs& a, const std::uint32_t* from) {                         \
    const std::uint32_t *x = a.x, *x3 = a.x + 3 * a.row_size;                                        \
    const char *const* ahead = a.ahead.places, *line;                                                \
    i64 num = a.num;                                                                                 \
    asm volatile(PILOTLIGHT_WORDS(rows, PILOTLIGHT_FETCH_##lines, "", "add $512, %[at]\n\t")          \
                 : [x] "+r"(x), [x3] "+r"(x3), [num] "+r"(num), [at] "+r"(from),                     \
                   [ahead] "+r"(ahead), [line] "=&r"(line)                                           \
                 : [row] "r"(a.row_size * 4), [total] "r"(&total), [step] "r"(a.ahead.step_bytes)    \
                 : PILOTLIGHT_CHANGED);                                                              \
  }                                                                                                  \
  template <int Lines>                                                                               \
  inline __attribute__((always_inline)) std::enable_if_t<Lines == lines> multiply_words(             \
      vi (&total)[rows][2], const WordsArgs& a, const std::uint32_t* const* from,                    \
      i64 offset_bytes) {                                                                            \
    const std::uint32_t *x = a.x, *x3 = a.x + 3 * a.row_size, *at;                                   \
    const char *const* ahead = a.ahead.places, *line;                                                \
    i64 num = a.num;                                                                                 \
    asm volatile(PILOTLIGHT_WORDS(rows, PILOTLIGHT_FETCH_##lines,                                    \
                                  "mov (%[from]), %[at]\n\tadd %[offset], %[at]\n\t",                \
                                  "add $8, %[from]\n\t")                                             \
                 : [x] "+r"(x), [x3] "+r"(x3), [num] "+r"(num), [from] "+r"(from), [at] "=&r"(at),   \
                   [ahead] "+r"(ahead), [line] "=&r"(line)                                           \
                 : [row] "r"(a.row_size * 4), [total] "r"(&total), [offset] "r"(offset_bytes),       \
                   [step] "r"(a.ahead.step_bytes)                                                    \
                 : PILOTLIGHT_CHANGED);                                                              \
  }

PILOTLIGHT_MULTIPLY_WORDS(1, 7)
PILOTLIGHT_MULTIPLY_WORDS(2, 7)
PILOTLIGHT_MULTIPLY_WORDS(3, 7)
PILOTLIGHT_MULTIPLY_WORDS(4, 7)
PILOTLIGHT_MULTIPLY_WORDS(5, 7)
PILOTLIGHT_MULTIPLY_WORDS(6, 7)
PILOTLIGHT_MULTIPLY_WORDS(1, 4)
PILOTLIGHT_MULTIPLY_WORDS(2, 4)
PILOTLIGHT_MULTIPLY_WORDS(3, 4)
PILOTLIGHT_MULTIPLY_WORDS(4, 4)
PILOTLIGHT_MULTIPLY_WORDS(5, 4)
PILOTLIGHT_MULTIPLY_WORDS(6, 4)

#endif
