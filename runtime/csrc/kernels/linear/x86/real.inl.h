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

template <class V, int rows, int vectors>
inline void add_quad(typename V::F (&acc)[rows][vectors], int v, const Centre<V>& centre, typename V::I w, const float* const (&x)[rows],
                     std::int64_t k) {
  const typename V::F value[4] = {centre.template value<0>(w), centre.template value<1>(w), centre.template value<2>(w),
                                  centre.template value<3>(w)};
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][v] = V::fmadd(V::all_f(x[i][k + j]), value[j], acc[i][v]);
  }
}

template <class V, int bits, int rows> void real_few_group(const Multiplication& m, std::int64_t group, float* out) {
  constexpr int kParts = 16 / V::kWidth, kVectors = 2 * kParts;
  const Centre<V> centre(m);
  const auto step = V::all_f(grid_step(m));
  const bool blocks = m.spec.block_size != 0;
  const std::int64_t steps = 2 * m.sizes.chunks, each = blocks ? m.spec.block_size / kStep : steps;
  const float* x[rows];
  for (int i = 0; i < rows; ++i) x[i] = m.a.floats + i * m.a.float_stride;
  for (int half = 0; half < kVectors; ++half) {
    const std::int64_t panel = 2 * group + half / kParts;
    if (panel >= m.sizes.panels) break;
    const std::uint8_t* weight = m.weight + panel * m.panel_bytes() + half % kParts * 32;
    const std::uint16_t* scales = m.scales + panel * m.sizes.blocks * kLanes + half % kParts * V::kWidth;
    typename V::F sum[rows];
    for (int i = 0; i < rows; ++i) sum[i] = V::zero_f();
    std::int64_t s = 0;
    for (std::int64_t b = 0; b < m.sizes.blocks; ++b) {
      typename V::F acc[rows][4];
      for (int i = 0; i < rows; ++i) {
        for (int q = 0; q < 4; ++q) acc[i][q] = V::zero_f();
      }
      const std::int64_t end = (b + 1) * each < steps ? (b + 1) * each : steps;
      for (; s < end; ++s) {
        typename V::I w[8];
        decode<V, bits>(weight, s, w);
        _mm_prefetch(reinterpret_cast<const char*>(weight + s * 64 * bits + kPrefetch), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) add_quad<V, rows, 4>(acc, q % 4, centre, w[q], x, s * kStep + q * 4);
      }
      for (int i = 0; i < rows; ++i) {
        const auto part = V::add_f(V::add_f(acc[i][0], acc[i][1]), V::add_f(acc[i][2], acc[i][3]));
        sum[i] = blocks ? V::fmadd(part, V::mul_f(V::half(scales + b * kLanes), step), sum[i]) : V::mul_f(part, step);
      }
    }
    for (int i = 0; i < rows; ++i) V::store_f(out + i * 32 + half * V::kWidth, sum[i]);
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
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = part.start ? V::zero_f() : V::load_f(out + i * 32 + v * V::kWidth);
  }
  const float* x = m.a.floats + row * m.a.float_stride + part.first * kChunk;
  for (std::int64_t k = 0; k < part.chunks * kChunk; ++k) {
    typename V::F values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = V::load_f(w + k * 32 + column + v * V::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto one = V::all_f(x[i * m.a.float_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::fmadd(one, values[v], acc[i][v]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) V::store_f(out + i * 32 + v * V::kWidth, acc[i][v]);
  }
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
