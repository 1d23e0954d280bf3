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
template <class V, Gate gate> inline typename V::F activated(typename V::F g) {
  auto t = g;
  if constexpr (gate == Gate::kGeluTanh) {
    const auto cubic = V::fmadd(V::mul_f(V::mul_f(g, g), g), V::all_f(0.044715f), g);
    t = V::mul_f(cubic, V::all_f(1.5957691216f));
  }
  const auto one = V::all_f(1.0f);
  return V::mul_f(g, V::reciprocal(V::add_f(one, exponential<V>(V::mul_f(t, V::all_f(-1.0f))))));
}

// What one group of two panels needs beside its accumulators.
struct Group {
  alignas(64) float scales[32] = {};  // of its output channels; per channel only
  alignas(64) float bias[32] = {};
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

// What accumulators hold: int32 sums over all columns, or float sums of scaled blocks; of codes, or of floats.
enum class Sums { kCodes, kCodeBlocks, kFloats, kFloatBlocks };

inline Sums sums_of(const LinearSpec& spec) {
  if (spec.activation_bits == 16) return spec.block_size == 0 ? Sums::kFloats : Sums::kFloatBlocks;
  return spec.block_size == 0 ? Sums::kCodes : Sums::kCodeBlocks;
}

template <class V, Sums sums>
inline typename V::F finished(const std::int32_t* at, typename V::I offset, typename V::F row_scale, typename V::F scale) {
  if constexpr (sums == Sums::kCodes) return V::mul_f(V::mul_f(V::to_f(V::add32(V::load(at), offset)), row_scale), scale);
  const auto sum = V::load_f(reinterpret_cast<const float*>(at));
  if constexpr (sums == Sums::kCodeBlocks) return V::mul_f(sum, row_scale);
  return sums == Sums::kFloats ? V::mul_f(sum, scale) : sum;
}

// Rows [begin, end) of a group, whose accumulators are 32 apart. Everything is copied to locals: a vector that is stored may alias
// anything.
template <class V, Sums sums, Gate gate>
void finish_rows(const Multiplication& m, const Group& of, std::int64_t group, std::int64_t begin, std::int64_t end,
                 const std::int32_t* accumulators) {
  constexpr int kVectors = 32 / V::kWidth, kOutputs = gate == Gate::kNone ? 32 : 16, kOut = kOutputs / V::kWidth;
  constexpr bool codes = sums == Sums::kCodes || sums == Sums::kCodeBlocks;
  const std::int64_t first = group * kOutputs, N = m.spec.N, left = N - first;
  const bool biased = m.bias != nullptr;
  const float* row_scales = codes ? m.a.scales : nullptr;
  const std::int32_t* offsets = sums == Sums::kCodes ? m.a.offsets : nullptr;
  typename V::F scales[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    scales[v] = V::load_f(of.scales + v * V::kWidth);
    bias[v] = V::load_f(of.bias + v * V::kWidth);
  }
  float* y = m.y + begin * N + first;
  for (std::int64_t row = begin; row < end; ++row, accumulators += 32, y += N) {
    const auto row_scale = codes ? V::all_f(row_scales[row]) : V::zero_f();
    const auto offset = sums == Sums::kCodes ? V::all32(offsets[row]) : V::zero();
    typename V::F values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = finished<V, sums>(accumulators + v * V::kWidth, offset, row_scale, scales[v]);
    if (biased) {
      for (int v = 0; v < kVectors; ++v) values[v] = V::add_f(values[v], bias[v]);
    }
    if constexpr (gate != Gate::kNone) {
      for (int v = 0; v < kOut; ++v) values[v] = V::mul_f(activated<V, gate>(values[v]), values[v + kOut]);
    }
    if (left >= kOutputs) {
      for (int v = 0; v < kOut; ++v) V::store_f(y + v * V::kWidth, values[v]);
    } else {
      alignas(64) float all[32];
      for (int v = 0; v < kOut; ++v) V::store_f(all + v * V::kWidth, values[v]);
      __builtin_memcpy(y, all, static_cast<std::size_t>(left) * sizeof(float));
    }
  }
}

template <class V, Sums sums>
void finish_rows(const Multiplication& m, const Group& of, std::int64_t group, std::int64_t begin, std::int64_t end,
                 const std::int32_t* accumulators) {
  switch (m.spec.gate) {
    case Gate::kNone: return finish_rows<V, sums, Gate::kNone>(m, of, group, begin, end, accumulators);
    case Gate::kSilu: return finish_rows<V, sums, Gate::kSilu>(m, of, group, begin, end, accumulators);
    case Gate::kGeluTanh: return finish_rows<V, sums, Gate::kGeluTanh>(m, of, group, begin, end, accumulators);
  }
}

template <class V>
void finish_rows(const Multiplication& m, const Group& of, std::int64_t group, std::int64_t begin, std::int64_t end,
                 const std::int32_t* accumulators) {
  switch (sums_of(m.spec)) {
    case Sums::kCodes: return finish_rows<V, Sums::kCodes>(m, of, group, begin, end, accumulators);
    case Sums::kCodeBlocks: return finish_rows<V, Sums::kCodeBlocks>(m, of, group, begin, end, accumulators);
    case Sums::kFloats: return finish_rows<V, Sums::kFloats>(m, of, group, begin, end, accumulators);
    case Sums::kFloatBlocks: return finish_rows<V, Sums::kFloatBlocks>(m, of, group, begin, end, accumulators);
  }
}

template <class V>
void finish(const Multiplication& m, std::int64_t group, std::int64_t begin, std::int64_t end, const std::int32_t* accumulators) {
  Group of;
  load_group<V>(m, group, &of);
  finish_rows<V>(m, of, group, begin, end, accumulators);
}
