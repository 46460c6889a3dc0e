// The operations over panels: products, finished as they leave; packing; rows of a packed table.
// Included by each level_*.cpp after packed_pairs.h; see there.

// How a level multiplies T.
template <class T>
struct Product {
  using Plan = PackedPlan<T>;
  using Worker = PackedWorker<T>;
};

template <>
struct Product<Int12> {
  using Plan = IntegerPlan;
  using Worker = IntegerWorker;
};

#if HAS_BF16_DOT && !HAS_AMX
template <>
struct Product<bf16> {
  using Plan = PairPlan;
  using Worker = PairWorker;
};
#endif

// Pieces for threads to take, some that follow each other at a time: memory is read best in order. The
// last ones, which threads wait for, are taken one by one.
class Pieces {
 public:
  explicit Pieces(i64 num) : num_(num) {}

  // body(index) for each that this thread gets.
  template <class Body>
  void take(Body body) {
    for (i64 first = 0, end; (end = taken(first)) > first;) {
      for (i64 index = first; index < end; ++index) body(index);
    }
  }

 private:
  // The end of some, from `first` on; `first` where none are left.
  i64 taken(i64& first) {
    first = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    for (i64 end;;) {
      const i64 share = (num_ - first) / (2 * num_threads());
      end = first + (share > 1 ? share : first < num_);
      if (__atomic_compare_exchange_n(&next_, &first, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        return end;
      }
    }
  }

  const i64 num_;
  i64 next_ = 0;
};

template <class T, class Emit>
bool packed_product(const PackedLinearArgs& a, i64 num_panels, i64 unit, Emit emit) {
  if (a.num_rows == 0) return true;
  typename Product<T>::Plan plan(a, num_panels, unit);
  if constexpr (std::is_same<T, Int12>::value) {
    if (!plan.take_rows(a)) return false;
  }
  Pieces pieces(plan.num_chunks * plan.num_pieces);
  bool has_memory = true;
  auto body = [&](i64) {
    auto* memory = static_cast<char*>(scratch(plan.num_bytes()));
    if (!memory) return __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    const std::conditional_t<UsesTiles<T>::value, TileSession, char> session = {};
    (void)session;
    typename Product<T>::Worker worker(a, plan, num_panels, memory);
    pieces.take([&](i64 index) { worker.run(index, emit); });
  };
  parallel(num_threads(), 1, body);
  return has_memory;
}

template <class T>
bool packed_linear(const PackedLinearArgs& a) {
  const auto* bias = static_cast<const Value<T>*>(a.bias);
  const auto emit = [&](i64 row, i64 panel, i64 num_panels, const float* sums) {
    const i64 output = panel * kPanel, left = a.num_outputs - output;
    const i64 size = num_panels * kPanel;
    auto* out = static_cast<Value<T>*>(a.out) + row * a.num_outputs + output;
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
    auto* out = static_cast<Value<T>*>(a.out) + row * a.num_outputs + panel / 2 * kPanel;
    for (i64 pair = 0; pair < num_panels / 2; ++pair, sums += 2 * kPanel, out += kPanel) {
      for (int i = 0; i < kPanel; i += kLanes) {
        const vf gate = load(sums + i, Whole{}), up = load(sums + kPanel + i, Whole{});
        store(out + i, gate / (splat(1.0f) + exp(-gate)) * up, Whole{});
      }
    }
  };
  return packed_product<T>(a, 2 * a.num_outputs / kPanel, 2, emit);
}

// Up to 16 rows of a matrix, null where there is none, into a panel.
template <class T>
void pack_panel(const T* const* rows, i64 num_inputs, std::uint32_t* to, T) {
  using Shape = PackedShape<T>;
  const i64 num_whole = num_inputs / Shape::kPerWord, num_words = Shape::num_words(num_inputs);
  const char* from[kPanel];
  for (i64 i = 0; i < kPanel; ++i) from[i] = reinterpret_cast<const char*>(rows[i]);
  transpose_words(from, num_whole, to, kPanel);
  // An odd last bf16 is a word with an empty half.
  for (i64 i = 0; i < kPanel && num_whole < num_words; ++i) {
    std::uint32_t bits = 0;
    if (from[i]) std::memcpy(&bits, from[i] + num_whole * 4, sizeof(T));
    to[num_whole * kPanel + i] = bits;
  }
}

// Rows of one or, in turn by panels, two matrices [num_outputs, num_inputs] into panels.
template <class T>
bool pack_panels(const PackArgs& a) {
  using Shape = PackedShape<T>;
  const i64 panel_words = Shape::panel_words(Shape::num_words(a.num_inputs));
  const i64 num_matrices = a.second ? 2 : 1;
  const i64 num_panels = (a.num_outputs + kPanel - 1) / kPanel * num_matrices;
  expect_large_pages(a.out, num_panels * panel_words * 4);
  auto body = [&](i64 panel) {
    const bool is_second = a.second && panel % 2 == 1;
    const auto* from = static_cast<const Value<T>*>(is_second ? a.second : a.first);
    const Value<T>* rows[kPanel];
    for (i64 i = 0; i < kPanel; ++i) {
      const i64 output = panel / num_matrices * kPanel + i;
      rows[i] = output < a.num_outputs ? from + output * a.num_inputs : nullptr;
    }
    pack_panel(rows, a.num_inputs, static_cast<std::uint32_t*>(a.out) + panel * panel_words, T{});
  };
  parallel(num_panels, grain_for(panel_words), body);
  return true;
}

template <class T>
void unpack_row(const std::uint32_t* panel, i64 place, i64 num_inputs, T* to, T) {
  const std::uint32_t* from = panel + place;
  const i64 num_whole = num_inputs / PackedShape<T>::kPerWord;
  for (i64 word = 0; word < num_whole; ++word) {
    std::memcpy(to + word * PackedShape<T>::kPerWord, from + word * kPanel, 4);
  }
  const i64 done = num_whole * PackedShape<T>::kPerWord;
  if (done < num_inputs) std::memcpy(to + done, from + num_whole * kPanel, sizeof(T));
}

template <class T>
bool packed_embedding(const PackedEmbeddingArgs& a) {
  const i64 num_words = PackedShape<T>::num_words(a.num_inputs);
  const i64 panel_words = PackedShape<T>::panel_words(num_words);
  auto body = [&](i64 row) {
    const i64 id = a.token_ids[row];
    const auto* panel = static_cast<const std::uint32_t*>(a.weight) + id / kPanel * panel_words;
    unpack_row(panel, id % kPanel, a.num_inputs, static_cast<Value<T>*>(a.out) + row * a.num_inputs, T{});
  };
  parallel(a.num_rows, grain_for(8 * num_words), body);
  return true;
}
