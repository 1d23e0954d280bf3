// Float activations. Included in the anonymous namespace of a file that has set its target.

constexpr std::int64_t kRealChunks = 4;  // a decoded part of 256 columns of two panels is 32 KiB

// Integers of a code's byte, half as large where the grid is odd: u - zero (exact in float).
template <class V> struct Centre {
  typename V::F zero;
  explicit Centre(const Multiplication& m)
      : zero(V::all_f(m.spec.odd_grid ? 0.5f * static_cast<float>(m.zero_point()) : static_cast<float>(m.zero_point()))) {}
  template <int j> typename V::F value(typename V::I w) const { return V::sub_f(V::to_f(V::template byte<j>(w)), zero); }
};

inline float grid_step(const Multiplication& m) { return m.spec.odd_grid ? 2.0f : 1.0f; }

// To sum v of each row: one quad.
template <class V, int v, int rows, int vectors>
BDQ_INLINE inline void add_quad(typename V::F (&acc)[rows][vectors], const Centre<V>& centre, typename V::I w,
                                const float* const (&x)[rows], std::int64_t k) {
  const typename V::F value[4] = {centre.template value<0>(w), centre.template value<1>(w), centre.template value<2>(w),
                                  centre.template value<3>(w)};
  each_pair<rows, 4>([&](auto i, auto j) BDQ_INLINE {
    acc[i.value][v] = V::fmadd(V::all_f(x[i.value][k + j.value]), value[j.value], acc[i.value][v]);
  });
}

template <class V, int bits, int rows> void real_few_group(const Multiplication& m, std::int64_t group, float* out) {
  constexpr int kParts = 16 / V::kWidth, kVectors = 2 * kParts;
  const Centre<V> centre(m);
  const auto step = V::all_f(grid_step(m));
  const bool blocks = m.spec.block_size != 0;
  const std::int64_t steps = 2 * m.sizes.chunks;
  const std::int64_t steps_each = blocks ? m.spec.block_size / kStep : steps;
  const float* x[rows];
  for (int i = 0; i < rows; ++i) x[i] = m.a.floats + i * m.a.float_stride;
  for (int half = 0; half < kVectors; ++half) {
    const std::int64_t panel = 2 * group + half / kParts;
    if (panel >= m.sizes.panels) break;
    const std::uint8_t* weight = m.weight + panel * m.panel_bytes() + half % kParts * 32;
    const std::uint16_t* scales = m.scales + panel * m.sizes.blocks * kLanes + half % kParts * V::kWidth;
    typename V::F sum[rows];
    each<rows>([&](auto i) BDQ_INLINE { sum[i.value] = V::zero_f(); });
    std::int64_t s = 0;
    for (std::int64_t b = 0; b < m.sizes.blocks; ++b) {
      typename V::F acc[rows][4];
      each_pair<rows, 4>([&](auto i, auto q) BDQ_INLINE { acc[i.value][q.value] = V::zero_f(); });
      const std::int64_t end = (b + 1) * steps_each < steps ? (b + 1) * steps_each : steps;
      for (; s < end; ++s) {
        typename V::I w[8];
        decode<V, bits>(weight, s, w);
        _mm_prefetch(reinterpret_cast<const char*>(weight + s * 64 * bits + kPrefetch), _MM_HINT_T0);
        each<8>([&](auto q) BDQ_INLINE { add_quad<V, q.value % 4, rows, 4>(acc, centre, w[q.value], x, s * kStep + q.value * 4); });
      }
      each<rows>([&](auto i) BDQ_INLINE {
        auto& one = acc[i.value];
        const auto part = V::add_f(V::add_f(one[0], one[1]), V::add_f(one[2], one[3]));
        const auto scale = blocks ? V::mul_f(V::half(scales + b * kLanes), step) : step;
        sum[i.value] = V::fmadd(part, scale, sum[i.value]);
      });
    }
    each<rows>([&](auto i) BDQ_INLINE { V::store_f(out + i.value * 32 + half * V::kWidth, sum[i.value]); });
  }
}

template <class V, int bits> void real_few(const Multiplication& m, std::int64_t begin, std::int64_t end) {
  alignas(64) float out[kGemvRows * 32] = {};
  for (std::int64_t group = begin; group < end; ++group) {
    switch (m.a.M) {
      case 1: real_few_group<V, bits, 1>(m, group, out); break;
      case 2: real_few_group<V, bits, 2>(m, group, out); break;
      case 3: real_few_group<V, bits, 3>(m, group, out); break;
      default: real_few_group<V, bits, 4>(m, group, out); break;
    }
    finish<V>(m, group, 0, m.a.M, reinterpret_cast<const std::int32_t*>(out));
  }
}

// From decoded bytes to floats [k, 32]: the integers, times their block's scale where there are blocks.
template <class V> void real_part(const Multiplication& m, const Part& part, float* to) {
  constexpr int kParts = 16 / V::kWidth;
  const std::int64_t zero = m.zero_point();
  const auto centre = V::all32(static_cast<std::int32_t>(zero));
  for (std::int64_t v = 0; v < 2 * kParts; ++v) {
    const std::int64_t p = v / kParts < part.panels ? v / kParts : 0;
    const std::uint8_t* from = part.codes + p * part.chunks * 1024 + v % kParts * 32;
    for (std::int64_t q = 0; q < part.chunks * 16; ++q) {
      const auto w = V::load(from + q * 64);
      typename V::F value[4] = {V::to_f(V::sub32(V::template byte<0>(w), centre)), V::to_f(V::sub32(V::template byte<1>(w), centre)),
                                V::to_f(V::sub32(V::template byte<2>(w), centre)), V::to_f(V::sub32(V::template byte<3>(w), centre))};
      float* at = to + q * 4 * 32 + v * V::kWidth;
      if (m.spec.block_size != 0) {
        const std::int64_t block = q * 4 / m.spec.block_size;
        const auto scale = V::load_f(part.scales + block * 32 + v * V::kWidth);
        for (auto& one : value) one = V::mul_f(one, scale);
      }
      for (int j = 0; j < 4; ++j) V::store_f(at + j * 32, value[j]);
    }
  }
}

template <class V, int rows>
void real_tile(const Multiplication& m, const Part& part, const float* w, std::int64_t row, std::int64_t column, float* out) {
  constexpr int kVectors = 2;
  typename V::F acc[rows][kVectors];
  each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE {
    acc[i.value][v.value] = part.start ? V::zero_f() : V::load_f(out + i.value * 32 + v.value * V::kWidth);
  });
  const std::int64_t stride = m.a.float_stride, columns = part.chunks * kChunk;
  const float* x = m.a.floats + row * stride + part.first * kChunk;
  w += column;
#pragma GCC unroll 2
  for (std::int64_t k = 0; k < columns; ++k, w += 32) {
    typename V::F values[kVectors];
    each<kVectors>([&](auto v) BDQ_INLINE { values[v.value] = V::load_f(w + v.value * V::kWidth); });
    each<rows>([&](auto i) BDQ_INLINE {
      const auto one = V::all_f(x[i.value * stride + k]);
      each<kVectors>([&](auto v) BDQ_INLINE { acc[i.value][v.value] = V::fmadd(one, values[v.value], acc[i.value][v.value]); });
    });
  }
  each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE {
    V::store_f(out + i.value * 32 + v.value * V::kWidth, acc[i.value][v.value]);
  });
}

template <class V>
void real_rows(const Multiplication& m, const Part& part, std::int64_t begin, std::int64_t end, std::int32_t* out,
               const float* decoded) {
  for (std::int64_t column = 0; column < 32; column += 2 * V::kWidth) {
    std::int64_t row = begin;
    const auto at = [&] { return reinterpret_cast<float*>(out) + (row - begin) * 32 + column; };
    if constexpr (V::kWidth == 16) {
      for (; row + 8 <= end; row += 8) real_tile<V, 8>(m, part, decoded, row, column, at());
    }
    for (; row + 4 <= end; row += 4) real_tile<V, 4>(m, part, decoded, row, column, at());
    for (; row < end; ++row) real_tile<V, 1>(m, part, decoded, row, column, at());
  }
}

constexpr std::size_t kRealBytes = (kRealChunks + 4) * kChunk * 32 * sizeof(float);

template <class V>
void multiply_real(const Multiplication& m, std::int64_t begin, std::int64_t end, std::int64_t group_begin, std::int64_t group_end,
                   std::uint8_t* scratch) {
  if (m.a.M <= kGemvRows) {
    switch (m.spec.weight_bits) {
      case 2: return real_few<V, 2>(m, group_begin, group_end);
      case 3: return real_few<V, 3>(m, group_begin, group_end);
      case 4: return real_few<V, 4>(m, group_begin, group_end);
      default: return real_few<V, 8>(m, group_begin, group_end);
    }
  }
  auto* decoded = reinterpret_cast<float*>(scratch);
  multiply_many<V>(
      m, begin, end, group_begin, group_end, scratch + kRealBytes, kRealChunks,
      [&](const Part& part) { real_part<V>(m, part, decoded); },
      [&](const Part& part, std::int64_t from, std::int64_t to, std::int32_t* out) { real_rows<V>(m, part, from, to, out, decoded); });
}
