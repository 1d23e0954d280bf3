// From accumulators to y. Included in the anonymous namespace of a file that has set its target.

// Of a number within [-87, 87], and of the nearest of these for others: the sigmoids below lose nothing that float32 shows.
template <class V> inline typename V::F exponential(typename V::F x) {
  x = V::min_f(V::all_f(87.0f), V::max_f(V::all_f(-87.0f), x));  // a NaN passes
  const auto n = V::round_f(V::mul_f(x, V::all_f(1.44269504f)));
  auto r = V::fmadd(n, V::all_f(-0.693359375f), x);
  r = V::fmadd(n, V::all_f(2.12194440e-4f), r);
  auto p = V::fmadd(V::all_f(1.9875691500e-4f), r, V::all_f(1.3981999507e-3f));
  p = V::fmadd(p, r, V::all_f(8.3334519073e-3f));
  p = V::fmadd(p, r, V::all_f(4.1665795894e-2f));
  p = V::fmadd(p, r, V::all_f(1.6666665459e-1f));
  p = V::fmadd(p, r, V::all_f(5.0000001201e-1f));
  p = V::fmadd(p, V::mul_f(r, r), V::add_f(r, V::all_f(1.0f)));
  return V::mul_f(p, V::from_bits(V::power_of_two_bits(V::to_i(n))));
}

// act(g): g / (1 + exp(-t)), t = g or 2 sqrt(2 / pi) (g + 0.044715 g^3), which is 0.5 g (1 + tanh(t / 2)) without its cancellation.
template <class V> inline typename V::F activated(Gate gate, typename V::F g) {
  auto t = g;
  if (gate == Gate::kGeluTanh) {
    const auto cubic = V::fmadd(V::mul_f(V::mul_f(g, g), g), V::all_f(0.044715f), g);
    t = V::mul_f(cubic, V::all_f(1.5957691216f));
  }
  const auto one = V::all_f(1.0f);
  return V::mul_f(g, V::reciprocal(V::add_f(one, exponential<V>(V::mul_f(t, V::all_f(-1.0f))))));
}

// What one group of two panels needs beside its accumulators.
struct Group {
  alignas(64) float scales[32];  // of its output channels; per channel only
  alignas(64) float bias[32];
};

template <class V> void load_group(const Multiplication& m, std::int64_t group, Group* to) {
  const bool gate = m.spec.gate != Gate::kNone;
  for (std::int64_t p = 0; p < 2; ++p) {
    const std::int64_t panel = 2 * group + p, first = gate ? group * kLanes : panel * kLanes;
    if (m.spec.block_size == 0 && panel < m.sizes.panels) {
      for (int i = 0; i < kLanes; i += V::kWidth) V::store_f(to->scales + p * kLanes + i, V::half(m.scales + panel * kLanes + i));
    }
    if (m.bias == nullptr) continue;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const bool real = panel < m.sizes.panels && first + lane < m.spec.N;
      to->bias[p * kLanes + lane] = real ? m.bias[first + lane + (gate ? p * m.spec.N : 0)] : 0.0f;
    }
  }
}

// One row of a group. accumulators [32]: int32 per channel, else float.
template <class V>
inline void finish_row(const Multiplication& m, const Group& group, std::int64_t first, std::int64_t row, const void* accumulators) {
  constexpr int kVectors = 32 / V::kWidth;
  const auto* floats = static_cast<const float*>(accumulators);
  const bool per_channel = m.spec.block_size == 0;
  typename V::F y[kVectors];
  if (m.spec.activation_bits != 16) {
    const auto scale = V::all_f(m.a.scales[row]);
    if (per_channel) {
      const auto offset = V::all32(m.a.offsets[row]);
      for (int v = 0; v < kVectors; ++v) {
        const auto sum = V::add32(V::load(floats + v * V::kWidth), offset);
        y[v] = V::mul_f(V::mul_f(V::to_f(sum), scale), V::load_f(group.scales + v * V::kWidth));
      }
    } else {
      for (int v = 0; v < kVectors; ++v) y[v] = V::mul_f(V::load_f(floats + v * V::kWidth), scale);
    }
  } else {
    for (int v = 0; v < kVectors; ++v) {
      y[v] = V::load_f(floats + v * V::kWidth);
      if (per_channel) y[v] = V::mul_f(y[v], V::load_f(group.scales + v * V::kWidth));
    }
  }
  if (m.bias != nullptr) {
    for (int v = 0; v < kVectors; ++v) y[v] = V::add_f(y[v], V::load_f(group.bias + v * V::kWidth));
  }
  int vectors = kVectors;
  if (m.spec.gate != Gate::kNone) {
    vectors = kVectors / 2;
    for (int v = 0; v < kVectors / 2; ++v) y[v] = V::mul_f(activated<V>(m.spec.gate, y[v]), y[v + kVectors / 2]);
  }
  float* to = m.y + row * m.spec.N + first;
  const std::int64_t left = m.spec.N - first;
  if (left >= vectors * V::kWidth) {
    for (int v = 0; v < vectors; ++v) V::store_f(to + v * V::kWidth, y[v]);
  } else {
    alignas(64) float all[32];
    for (int v = 0; v < vectors; ++v) V::store_f(all + v * V::kWidth, y[v]);
    __builtin_memcpy(to, all, static_cast<std::size_t>(left) * sizeof(float));
  }
}

// Rows [begin, end) of a group, whose accumulators are 32 apart.
template <class V>
void finish_rows(const Multiplication& m, const Group& of, std::int64_t group, std::int64_t begin, std::int64_t end,
                 const std::int32_t* accumulators) {
  const std::int64_t first = group * (m.spec.gate == Gate::kNone ? 2 * kLanes : kLanes);
  for (std::int64_t row = begin; row < end; ++row) finish_row<V>(m, of, first, row, accumulators + (row - begin) * 32);
}

template <class V>
void finish(const Multiplication& m, std::int64_t group, std::int64_t begin, std::int64_t end, const std::int32_t* accumulators) {
  Group of;
  load_group<V>(m, group, &of);
  finish_rows<V>(m, of, group, begin, end, accumulators);
}
