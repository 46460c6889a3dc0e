// Exponentials of vectors, and the shift that keeps a softmax in range. Knows no operation.
// Included by each level_*.cpp after simd.h; see there.

// exp(x), relative error below 2e-7; 0 below -87.3, a large number above 88.3, NaN for NaN.
// Source: Cephes expf: exp(x) = 2^n exp(r), r = x - n ln 2, ln 2 in two parts.
inline vf exp(vf x) {
  const vi is_zero = x < splat(-87.3f);
  x = select(x > splat(88.3f), splat(88.3f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * splat(1.44269504088896341f) + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  return select(is_zero, vf{}, p * (vf)exponent);
}

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0, relative error below 2e-7; 0 below -125, NaN for NaN. Source: Cephes exp2f.
inline vf exp2_negative(vf x) {
  const vi is_zero = x < splat(-125.0f);
  x = maximum(splat(-125.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = splat(1.535336188319500e-4f);
  p = p * r + splat(1.339887440266574e-3f);
  p = p * r + splat(9.618437357674640e-3f);
  p = p * r + splat(5.550332471162809e-2f);
  p = p * r + splat(2.402264791363012e-1f);
  p = p * r + splat(6.931472028550421e-1f);
  p = p * r + splat(1.0f);
  return (vf)(((vi)p + ((vi)shifted << 23)) & ~is_zero);
}

// The same for results of type T: for bf16 a polynomial of least greatest error, 1 at 0, relative error
// below 3e-6, a thousandth of what its rounding may be. From -126 on it is next to nothing, from -127 on
// 0: there the exponent that is added takes away that of 1.
template <class T>
inline vf exp2_negative(vf x) {
  if constexpr (!std::is_same<T, bf16>::value) return exp2_negative(x);
  x = maximum(splat(-127.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = splat(0.00958285f);
  p = p * r + splat(0.05590643f);
  p = p * r + splat(0.24024099f);
  p = p * r + splat(0.69312419f);
  p = p * r + splat(1.0f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

// A softmax in base 2: weights are 2^(score * factor - shift).
struct Shift {
  vf maxima, shift, rescale;  // of scores; times the factor; of what was weighed before

  Shift(vf before, vf seen, vf factor) : maxima(maximum(before, seen)) {
    // Nothing seen yet: any finite number turns masked scores into zeros.
    const vf none = splat(-kInfinity);
    shift = factor * select(maxima == none, vf{}, maxima);
    rescale = exp2_negative(select(before == none, none, before * factor - shift));
  }
};
