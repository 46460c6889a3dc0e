// The operations over panels: products, finished as they leave; packing; rows of a packed table.
// Included by each level_*.cpp after packed_pairs.h; see there.

// How a level multiplies T.
template <class T>
struct Product {
  using Plan = PackedPlan<T>;
  using Worker = PackedWorker<T>;
};

#if HAS_BF16_DOT && !HAS_AMX
template <>
struct Product<bf16> {
  using Plan = PairPlan;
  using Worker = PairWorker;
};
#endif

template <class T, class Emit>
bool packed_product(const PackedLinearArgs& a, i64 num_panels, i64 unit, Emit emit) {
  if (a.num_rows == 0) return true;
  const typename Product<T>::Plan plan(a, num_panels, unit);
  const i64 num_pieces = plan.num_chunks * plan.num_pieces;
  i64 next = 0;
  bool has_memory = true;
  auto body = [&](i64) {
    auto* memory = static_cast<char*>(scratch(plan.rows_bytes() + plan.sums_bytes()));
    if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    const std::conditional_t<UsesTiles<T>::value, TileSession, char> session = {};
    (void)session;
    typename Product<T>::Worker worker(a, plan, num_panels, memory);
    for (;;) {
      const i64 index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (index >= num_pieces) return;
      worker.run(index, emit);
    }
  };
  parallel(num_threads(), 1, body);
  return has_memory;
}

template <class T>
bool packed_linear(const PackedLinearArgs& a) {
  const T* bias = static_cast<const T*>(a.bias);
  const auto emit = [&](i64 row, i64 panel, i64 num_panels, const float* sums) {
    const i64 output = panel * kPanel, left = a.num_outputs - output;
    const i64 size = num_panels * kPanel;
    T* out = static_cast<T*>(a.out) + row * a.num_outputs + output;
    for_lanes(left < size ? left : size, [&](i64 i, auto extent) {
      const vf added = bias ? load(bias + output + i, extent) : vf{};
      store(out + i, load(sums + i, extent) + added, extent);
    });
  };
  return packed_product<T>(a, divide_up(a.num_outputs, kPanel), 1, emit);
}

// Panels of gate and up in turn; num_outputs counts one of them and is a multiple of kPanel.
template <class T>
bool packed_gate_up(const PackedLinearArgs& a) {
  const auto emit = [&](i64 row, i64 panel, i64 num_panels, const float* sums) {
    T* out = static_cast<T*>(a.out) + row * a.num_outputs + panel / 2 * kPanel;
    for (i64 pair = 0; pair < num_panels / 2; ++pair, sums += 2 * kPanel, out += kPanel) {
      for (int i = 0; i < kPanel; i += kLanes) {
        const vf gate = load(sums + i, Whole{}), up = load(sums + kPanel + i, Whole{});
        store(out + i, gate / (splat(1.0f) + exp(-gate)) * up, Whole{});
      }
    }
  };
  return packed_product<T>(a, 2 * a.num_outputs / kPanel, 2, emit);
}

// Rows of one or, in turn by panels, two matrices [num_outputs, num_inputs] into panels.
template <class T>
bool pack_panels(const PackArgs& a) {
  using Shape = PackedShape<T>;
  const i64 num_whole = a.num_inputs / Shape::kPerWord, num_words = Shape::num_words(a.num_inputs);
  const i64 num_matrices = a.second ? 2 : 1;
  const i64 num_panels = (a.num_outputs + kPanel - 1) / kPanel * num_matrices;
  expect_large_pages(a.out, num_panels * num_words * kPanel * 4);
  auto body = [&](i64 panel) {
    const bool is_second = a.second && panel % 2 == 1;
    const T* from = static_cast<const T*>(is_second ? a.second : a.first);
    auto* to = static_cast<std::uint32_t*>(a.out) + panel * num_words * kPanel;
    const char* rows[kPanel];
    for (i64 i = 0; i < kPanel; ++i) {
      const i64 output = panel / num_matrices * kPanel + i;
      const T* row = output < a.num_outputs ? from + output * a.num_inputs : nullptr;
      rows[i] = reinterpret_cast<const char*>(row);
    }
    transpose_words(rows, num_whole, to, kPanel);
    // An odd last bf16 is a word with an empty half.
    for (i64 i = 0; i < kPanel && num_whole < num_words; ++i) {
      std::uint32_t bits = 0;
      if (rows[i]) std::memcpy(&bits, rows[i] + num_whole * 4, sizeof(T));
      to[num_whole * kPanel + i] = bits;
    }
  };
  parallel(num_panels, grain_for(num_words * kPanel), body);
  return true;
}

template <class T>
bool packed_embedding(const PackedEmbeddingArgs& a) {
  using Shape = PackedShape<T>;
  const i64 num_words = Shape::num_words(a.num_inputs);
  auto body = [&](i64 row) {
    const i64 id = a.token_ids[row];
    const auto* from = static_cast<const std::uint32_t*>(a.weight) +
                       id / kPanel * num_words * kPanel + id % kPanel;
    char* to = static_cast<char*>(a.out) + row * a.num_inputs * sizeof(T);
    const i64 num_whole = a.num_inputs / Shape::kPerWord;
    for (i64 word = 0; word < num_whole; ++word) std::memcpy(to + word * 4, from + word * kPanel, 4);
    if (num_whole < num_words) std::memcpy(to + num_whole * 4, from + num_whole * kPanel, sizeof(T));
  };
  parallel(a.num_rows, grain_for(8 * num_words), body);
  return true;
}
