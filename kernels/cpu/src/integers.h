// Integers of 16 bits, two to a word: their products, added exactly in 32 bits.
// Included by each level_*.cpp after simd.h; see there.

struct Int16 {
  std::int16_t value;
};

// Lane by lane, the products of both halves added.
inline vi multiply_integer_pairs(vu a, vu b) {
#if LANES == 16 && defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8 && defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const vi low = ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16);
  return low + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

// total += the products of both halves, lane by lane. The one instruction that does both makes its
// sum wait for the multiplication: with few sums at a time two are quicker.
template <int NumSums>
inline __attribute__((always_inline)) void add_integers(vi& total, vu a, vu b) {
#if LANES == 16 && defined(__AVX512VNNI__)
  if constexpr (NumSums >= 4) {
    total = (vi)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
    return;
  }
#endif
  total += multiply_integer_pairs(a, b);
}

// Additions of integers may be put off by the compiler, until the products fill all registers.
inline __attribute__((always_inline)) void keep_order(vi& sum) {
#if LANES == 16 && defined(__AVX512BW__)
  asm("" : "+v"(sum));
#elif LANES == 8 && defined(__AVX2__)
  asm("" : "+x"(sum));
#else
  (void)sum;
#endif
}
