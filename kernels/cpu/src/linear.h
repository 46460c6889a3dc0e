// Rows times a weight matrix as checkpoints hold it, [num_outputs, num_inputs].
// Included by each level_*.cpp after tiles.h; see there.
//
// Few rows: dot products along the weight rows, read once, in order; the weights are all the memory
// traffic there is. Many rows: panels of weights are transposed once and multiplied as tiles.

constexpr i64 kPanelOutputs = 64;
constexpr i64 kPanelWords = 512;
constexpr i64 kDotOutputs = 16;     // weight rows of one piece of work
constexpr i64 kMostDotRows = 16;

// The rows as words: float, or pairs of bf16 (then they are the caller's own memory).
template <class T>
struct Rows {
  using Element = std::conditional_t<Words<T>::kPairs, bf16, float>;
  const Element* values;
  i64 stride;
};

template <class T, class Extent>
inline vu row_words(const typename Rows<T>::Element* from, Extent extent) {
  return load_words(from, extent);
}

template <class T, int NumRows, int NumOutputs, class Store>
inline void dot_block(Rows<T> x, const T* weight, i64 num_inputs, Store put) {
  constexpr int kElements = Words<T>::kElements;
  constexpr int kSums = (NumRows * NumOutputs + kLanes - 1) / kLanes * kLanes;
  vf total[kSums] = {};
  const auto add = [&](i64 i, auto extent) __attribute__((always_inline)) {
    vu w[NumOutputs];
#pragma GCC unroll 16
    for (int n = 0; n < NumOutputs; ++n) {
      const T* from = weight + n * num_inputs + i;
      if (NumRows <= 4) __builtin_prefetch(from + NumOutputs * num_inputs, 0, 3);
      w[n] = load_words(from, extent);
    }
#pragma GCC unroll 16
    for (int m = 0; m < NumRows; ++m) {
      const vu left = load_words(x.values + m * x.stride + i, extent);
#pragma GCC unroll 16
      for (int n = 0; n < NumOutputs; ++n) {
        vf& sum = total[m * NumOutputs + n];
        sum = multiply_add<Words<T>::kPairs>(sum, left, w[n]);
      }
    }
  };
  constexpr i64 kStep = kLanes * kElements;
  i64 i = 0;
  for (; i + kStep <= num_inputs; i += kStep) add(i, Whole{});
  if (i < num_inputs) add(i, Part{(num_inputs - i) / kElements});
#pragma GCC unroll 4
  for (int first = 0; first < kSums; first += kLanes) {
    vf block[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) block[j] = total[first + j];
    const vf result = sums(block);
    for (int j = 0; j < kLanes && first + j < NumRows * NumOutputs; ++j) {
      put((first + j) / NumOutputs, (first + j) % NumOutputs, result[j]);
    }
  }
}
