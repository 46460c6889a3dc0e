// Products of panels of 16-bit integers that are all in a cache: eight words of rows at a time.
// Included by each level_*.cpp after packed_integers.h; see there.
//
// Nothing is fetched here, unlike where weights are read; and a panel may lie in pieces of eight words.

constexpr i64 kWordsAtOnce = 8;
constexpr i64 kBytesAtOnce = kWordsAtOnce * kPanel * 4;

struct WordsArgs {
  const std::uint32_t* x;  // the first row's
  i64 row_size;
  i64 num;  // of pieces
};

template <int Rows>
inline __attribute__((always_inline)) void add_words(vi (&total)[Rows][kPanelVectors], const WordsArgs& a,
                                                     i64 index, const char* from) {
  WordArgs at = {a.x + index * kWordsAtOnce, a.row_size,
                 reinterpret_cast<const std::uint32_t*>(from), from, 0};
  for (i64 word = 0; word < kWordsAtOnce; ++word) add_word(total, at);
}

// total = the products of words that follow each other.
template <int Rows>
inline __attribute__((always_inline)) void multiply_words(vi (&total)[Rows][kPanelVectors],
                                                          const WordsArgs& a,
                                                          const std::uint32_t* from) {
  std::memset(total, 0, sizeof total);
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (i64 i = 0; i < a.num; ++i) add_words(total, a, i, bytes + i * kBytesAtOnce);
}

// total = the products of words in several places.
template <int Rows>
inline __attribute__((always_inline)) void multiply_words(vi (&total)[Rows][kPanelVectors],
                                                          const WordsArgs& a,
                                                          const std::uint32_t* const* from,
                                                          i64 offset_bytes) {
  std::memset(total, 0, sizeof total);
  for (i64 i = 0; i < a.num; ++i) {
    add_words(total, a, i, reinterpret_cast<const char*>(from[i]) + offset_bytes);
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
#define PILOTLIGHT_WORD(rows, index)                                                                 \
  "vmovdqu 64*" #index "(%[at]), %%ymm12\n\t"                                                        \
  "vmovdqu 64*" #index "+32(%[at]), %%ymm13\n\t"                                                     \
  PILOTLIGHT_ROWS_##rows(PILOTLIGHT_ADD_##index)
// `enter` and `leave` find the words: in %[at].
#define PILOTLIGHT_WORDS(rows, enter, leave)                                                         \
  PILOTLIGHT_ROWS_##rows(PILOTLIGHT_CLEAR)                                                           \
  "test %[num], %[num]\n\t"                                                                          \
  "je 2f\n\t"                                                                                        \
  ".p2align 5\n"                                                                                     \
  "1:\n\t"                                                                                           \
  enter                                                                                              \
  PILOTLIGHT_WORD(rows, 0) PILOTLIGHT_WORD(rows, 1) PILOTLIGHT_WORD(rows, 2)                         \
  PILOTLIGHT_WORD(rows, 3) PILOTLIGHT_WORD(rows, 4) PILOTLIGHT_WORD(rows, 5)                         \
  PILOTLIGHT_WORD(rows, 6) PILOTLIGHT_WORD(rows, 7)                                                  \
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
#define PILOTLIGHT_MULTIPLY_WORDS(rows)                                                              \
  inline __attribute__((always_inline)) void multiply_words(                                         \
      vi (&total)[rows][2], const WordsArgs& a, const std::uint32_t* from) {                         \
    const std::uint32_t *x = a.x, *x3 = a.x + 3 * a.row_size;                                        \
    i64 num = a.num;                                                                                 \
    asm volatile(PILOTLIGHT_WORDS(rows, "", "add $512, %[at]\n\t")                                   \
                 : [x] "+r"(x), [x3] "+r"(x3), [num] "+r"(num), [at] "+r"(from)                      \
                 : [row] "r"(a.row_size * 4), [total] "r"(&total)                                    \
                 : PILOTLIGHT_CHANGED);                                                              \
  }                                                                                                  \
  inline __attribute__((always_inline)) void multiply_words(                                         \
      vi (&total)[rows][2], const WordsArgs& a, const std::uint32_t* const* from,                    \
      i64 offset_bytes) {                                                                            \
    const std::uint32_t *x = a.x, *x3 = a.x + 3 * a.row_size, *at;                                   \
    i64 num = a.num;                                                                                 \
    asm volatile(PILOTLIGHT_WORDS(rows, "mov (%[from]), %[at]\n\tadd %[offset], %[at]\n\t",          \
                                  "add $8, %[from]\n\t")                                             \
                 : [x] "+r"(x), [x3] "+r"(x3), [num] "+r"(num), [from] "+r"(from), [at] "=&r"(at)    \
                 : [row] "r"(a.row_size * 4), [total] "r"(&total), [offset] "r"(offset_bytes)        \
                 : PILOTLIGHT_CHANGED);                                                              \
  }

PILOTLIGHT_MULTIPLY_WORDS(1)
PILOTLIGHT_MULTIPLY_WORDS(2)
PILOTLIGHT_MULTIPLY_WORDS(3)
PILOTLIGHT_MULTIPLY_WORDS(4)
PILOTLIGHT_MULTIPLY_WORDS(5)
PILOTLIGHT_MULTIPLY_WORDS(6)

#endif

