// Few rows: a weight is decoded in registers and read once. Included in the anonymous namespace of a file that has set its target.
// D::dot8<bits>(acc, other, w, a) adds 8 quads of products of codes w and the 32 bytes at a, half of them to each of acc and other.

// Accumulators of `panels` panels (of weights and scales that start at `panel`) for rows [0, rows), to out [rows, panels * 16].
template <class V, class D, int bits, int rows, int panels, bool blocks>
inline void gemv(const Multiplication& m, const std::int64_t (&panel)[panels], std::int32_t* out) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kParts = 16 / V::kWidth, kVectors = panels * kParts;
  const std::uint8_t* weight[kVectors];
  const std::uint16_t* scales[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    weight[v] = m.weight + panel[v / kParts] * m.panel_bytes() + v % kParts * 32;
    scales[v] = m.scales + panel[v / kParts] * m.sizes.blocks * kLanes + v % kParts * V::kWidth;
  }
  const std::int64_t steps = m.sizes.chunks * 2, row_bytes = m.padded_K(), panel_bytes = m.panel_bytes();
  const std::int64_t steps_each = blocks ? m.spec.block_size / kStep : steps;
  const int shift = m.spec.odd_grid ? 1 : 0;
  const std::int8_t* codes = m.a.codes;
  const std::int64_t blocks_count = m.sizes.blocks, sum_count = m.sum_count;
  F sum[rows][kVectors];
  each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE { sum[i.value][v.value] = V::zero_f(); });
  std::int64_t s = 0;
  for (std::int64_t b = 0; b < blocks_count; ++b) {
    I acc[rows][kVectors], other[rows][kVectors];
    each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE {
      acc[i.value][v.value] = other[i.value][v.value] = V::zero();
    });
    const std::int64_t end = (b + 1) * steps_each < steps ? (b + 1) * steps_each : steps;
    for (; s < end; ++s) {
      // Behind the end of a panel comes one that is read with it now: go on with those that are read next.
      std::int64_t ahead = s * 64 * bits + kPrefetch;
      if (ahead >= panel_bytes) ahead += (panels - 1) * panel_bytes;
      each<kVectors>([&](auto v) BDQ_INLINE {
        I w[8];
        decode<V, bits>(weight[v.value], s, w);
        if constexpr (v.value % kParts == 0) {
          each<bits>([&](auto line) BDQ_INLINE {
            _mm_prefetch(reinterpret_cast<const char*>(weight[v.value] + ahead + 64 * line.value), _MM_HINT_T0);
          });
        }
        each<rows>([&](auto i) BDQ_INLINE {
          D::template dot8<bits>(acc[i.value][v.value], other[i.value][v.value], w, codes + i.value * row_bytes + s * kStep);
        });
      });
    }
    each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE {
      const I both = V::left32(V::add32(acc[i.value][v.value], other[i.value][v.value]), shift);
      if constexpr (blocks) {
        const I exact = V::add32(both, V::all32(m.a.offsets[i.value * sum_count + b]));
        sum[i.value][v.value] = V::fmadd(V::to_f(exact), V::half(scales[v.value] + b * kLanes), sum[i.value][v.value]);
      } else {
        V::store(out + i.value * panels * kLanes + v.value * V::kWidth, both);
      }
    });
  }
  if constexpr (blocks) {
    each_pair<rows, kVectors>([&](auto i, auto v) BDQ_INLINE {
      V::store_f(reinterpret_cast<float*>(out) + i.value * panels * kLanes + v.value * V::kWidth, sum[i.value][v.value]);
    });
  }
}

// Scales of a row are a line for each group: too few for the processor to see that they follow each other.
inline void prefetch_scales(const Multiplication& m, std::int64_t group) {
  constexpr std::int64_t kGroupsAhead = 2;
  const std::int64_t panel = 2 * (group + kGroupsAhead);
  if (m.spec.block_size == 0) _mm_prefetch(reinterpret_cast<const char*>(m.scales + panel * kLanes), _MM_HINT_T0);
}

template <class V, class D, int bits, int rows, bool blocks>
void gemv_groups(const Multiplication& m, std::int64_t begin, std::int64_t end) {
  alignas(64) std::int32_t out[rows * 64] = {};
  std::int64_t group = begin;
  if constexpr (rows == 1 && V::kWidth == 16) {
    for (; group + 2 <= end && 2 * group + 4 <= m.sizes.panels; group += 2) {
      prefetch_scales(m, group + 1);
      gemv<V, D, bits, 1, 4, blocks>(m, {2 * group, 2 * group + 1, 2 * group + 2, 2 * group + 3}, out);
      finish<V>(m, group, 0, 1, out);
      finish<V>(m, group + 1, 0, 1, out + 32);
    }
  }
  for (; group < end; ++group) {
    prefetch_scales(m, group);
    const std::int64_t first = 2 * group, last = first + 1 < m.sizes.panels ? first + 1 : first;  // the last panel may be alone
    gemv<V, D, bits, rows, 2, blocks>(m, {first, last}, out);
    finish<V>(m, group, 0, rows, out);
  }
}

template <class V, class D, int bits, bool blocks>
void gemv_rows(const Multiplication& m, std::int64_t begin, std::int64_t end) {
  switch (m.a.M) {
    case 1: return gemv_groups<V, D, bits, 1, blocks>(m, begin, end);
    case 2: return gemv_groups<V, D, bits, 2, blocks>(m, begin, end);
    case 3: return gemv_groups<V, D, bits, 3, blocks>(m, begin, end);
    default: return gemv_groups<V, D, bits, 4, blocks>(m, begin, end);
  }
}

template <class V, class D, int bits> void gemv_bits(const Multiplication& m, std::int64_t begin, std::int64_t end) {
  m.spec.block_size == 0 ? gemv_rows<V, D, bits, false>(m, begin, end) : gemv_rows<V, D, bits, true>(m, begin, end);
}

template <class V, class D> void multiply_few(const Multiplication& m, std::int64_t begin, std::int64_t end) {
  switch (m.spec.weight_bits) {
    case 2: return gemv_bits<V, D, 2>(m, begin, end);
    case 3: return gemv_bits<V, D, 3>(m, begin, end);
    case 4: return gemv_bits<V, D, 4>(m, begin, end);
    default: return gemv_bits<V, D, 8>(m, begin, end);
  }
}
