// Rows times a weight matrix as checkpoints hold it, [num_outputs, num_inputs].
// Included by each level_*.cpp after tiles.h; see there.
//
// Both sides lie contiguous along the summed dimension, so a block of sums is kept as vectors, each
// added up across its lanes once at the end: the weights are read in place, in order, once.
// For hundreds of rows a library that repacks the weights first is faster.

constexpr int kDotRows = LANES == 16 ? 6 : 2;
constexpr int kDotOutputs = 4;
constexpr i64 kPieceOutputs = 16;

// The elements past the last whole vector, as words; the rest is zero.
template <class T>
inline vu load_tail(const T* from, i64 num_elements) {
  if constexpr (Words<T>::kPairs) {
    vu words = {};
    std::memcpy(&words, from, num_elements * sizeof(T));
    return words;
  } else {
    return (vu)load(from, Part{num_elements});
  }
}

template <class T, int NumRows, int NumOutputs>
struct DotBlock {
  static constexpr int kNum = NumRows * NumOutputs;
  static constexpr int kPadded = (kNum + kLanes - 1) / kLanes * kLanes;
  static constexpr i64 kStep = kLanes * Words<T>::kElements;
  static constexpr i64 kLine = 64 / sizeof(T);

  vf total[kPadded] = {};

  template <class Load>
  __attribute__((always_inline)) void add(const T* x, i64 row_stride, const T* weight,
                                          i64 num_inputs, Load load_at) {
    vu right[NumOutputs];
#pragma GCC unroll 8
    for (int n = 0; n < NumOutputs; ++n) right[n] = load_at(weight + n * num_inputs);
#pragma GCC unroll 8
    for (int m = 0; m < NumRows; ++m) {
      const vu left = load_at(x + m * row_stride);
#pragma GCC unroll 8
      for (int n = 0; n < NumOutputs; ++n) {
        vf& sum = total[m * NumOutputs + n];
        sum = multiply_add<Words<T>::kPairs>(sum, left, right[n]);
      }
    }
  }

  __attribute__((always_inline)) void run(const LinearArgs& a, const T* x, const T* weight) {
    const i64 size = a.num_inputs;
    const auto add_at = [&](i64 i, auto load_at) __attribute__((always_inline)) {
      add(x + i, a.row_stride, weight + i, size, load_at);
    };
    const auto whole = [](const T* from) { return load_words(from, Whole{}); };
    i64 i = 0;
    for (; i + kLine <= size; i += kLine) {
      // The next weight rows: four short streams are too many, too short, for the hardware alone.
#pragma GCC unroll 8
      for (int n = 0; n < NumOutputs; ++n) {
        __builtin_prefetch(weight + i + (NumOutputs + n) * size, 0, 2);
      }
#pragma GCC unroll 8
      for (i64 step = 0; step < kLine; step += kStep) add_at(i + step, whole);
    }
    for (; i + kStep <= size; i += kStep) add_at(i, whole);
    if (i < size) add_at(i, [&](const T* from) { return load_tail(from, size - i); });
  }

  // Adds up the lanes of `total` and writes [NumRows, NumOutputs].
  void finish(const LinearArgs& a, const T* bias, T* out) {
    float values[kPadded];
#pragma GCC unroll 8
    for (int first = 0; first < kPadded; first += kLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = total[first + j];
      store(values + first, sums(block), Whole{});
    }
    const Part part = {NumOutputs};
    const vf added = bias ? load(bias, part) : vf{};
    for (int m = 0; m < NumRows; ++m) {
      store(out + m * a.num_outputs, load(values + m * NumOutputs, part) + added, part);
    }
  }
};

template <class T, int NumOutputs, int NumRows = kDotRows>
inline void dot_rows(const LinearArgs& a, i64 row, i64 num_rows, i64 output) {
  if constexpr (NumRows > 0) {
    if (num_rows != NumRows) return dot_rows<T, NumOutputs, NumRows - 1>(a, row, num_rows, output);
    DotBlock<T, NumRows, NumOutputs> block;
    block.run(a, static_cast<const T*>(a.x) + row * a.row_stride,
              static_cast<const T*>(a.weight) + output * a.num_inputs);
    block.finish(a, a.bias ? static_cast<const T*>(a.bias) + output : nullptr,
                 static_cast<T*>(a.out) + row * a.num_outputs + output);
  }
}

// Every row against NumOutputs weight rows, in blocks of nearly equal numbers of rows.
template <class T, int NumOutputs>
inline void dot_outputs(const LinearArgs& a, i64 output) {
  const i64 num_blocks = (a.num_rows + kDotRows - 1) / kDotRows;
  for (i64 block = 0; block < num_blocks; ++block) {
    const i64 row = block * a.num_rows / num_blocks;
    const i64 end = (block + 1) * a.num_rows / num_blocks;
    dot_rows<T, NumOutputs>(a, row, end - row, output);
  }
}

template <class T>
bool linear(const LinearArgs& a) {
  auto body = [&](i64 piece) {
    i64 output = piece * kPieceOutputs;
    const i64 last = output + kPieceOutputs, end = last < a.num_outputs ? last : a.num_outputs;
    for (; output + kDotOutputs <= end; output += kDotOutputs) {
      dot_outputs<T, kDotOutputs>(a, output);
    }
    for (; output < end; ++output) dot_outputs<T, 1>(a, output);
  };
  const i64 piece_work = a.num_rows * a.num_inputs * kPieceOutputs / 16;
  parallel((a.num_outputs + kPieceOutputs - 1) / kPieceOutputs, grain_for(piece_work), body);
  return true;
}
