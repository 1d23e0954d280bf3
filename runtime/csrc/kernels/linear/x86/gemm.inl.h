// Many rows: a block of two panels is decoded to bytes in the first-level cache and used by all rows. Included in the anonymous
// namespace of a file that has set its target.

// Where things are while columns of chunks [first, first + chunks) are multiplied.
struct Part {
  std::int64_t first = 0, chunks = 0;
  std::uint8_t* codes = nullptr;        // [2 panels, chunks, 16 quads, 64]
  float* scales = nullptr;              // [blocks of the part, 32]; per block only
  std::int64_t panels = 2;
  bool start = false;                   // accumulators are not set yet
  std::int64_t pair_quads = 4;          // quads whose sums of pairs 16 bits hold
};

// Sums of two neighbouring products are at most 2 * largest code * 2^(bits - 1): this many of them fit 16 bits, a multiple of 4.
inline std::int64_t pair_quads(const LinearSpec& spec) {
  const std::int64_t code = ((1 << spec.weight_bits) - 1) * (spec.odd_grid ? 2 : 1);
  return 32767 / (code << spec.activation_bits) / 4 * 4;
}

template <class V, int bits> void decode_part(const Multiplication& m, std::int64_t group, const Part& part) {
  constexpr int kParts = 16 / V::kWidth;
  for (std::int64_t p = 0; p < part.panels; ++p) {
    const std::uint8_t* panel = m.weight + (2 * group + p) * m.panel_bytes();
    std::uint8_t* to = part.codes + p * part.chunks * 1024;
    for (std::int64_t s = 2 * part.first; s < 2 * (part.first + part.chunks); ++s, to += 512) {
      for (int half = 0; half < kParts; ++half) {
        typename V::I w[8];
        decode<V, bits>(panel + half * 32, s, w);
        if (half == 0) {
          each<bits>([&](auto line) BDQ_INLINE {
            _mm_prefetch(reinterpret_cast<const char*>(panel + s * 64 * bits + 64 * line.value + kPrefetch), _MM_HINT_T0);
          });
        }
        if (bits < 8 && m.spec.odd_grid) {
          for (int i = 0; i < 8; ++i) w[i] = V::add8(w[i], w[i]);
        }
        for (int i = 0; i < 8; ++i) V::store(to + i * 64 + half * 32, w[i]);
      }
    }
  }
}

template <class V> void decode_part(const Multiplication& m, std::int64_t group, const Part& part) {
  switch (m.spec.weight_bits) {
    case 2: decode_part<V, 2>(m, group, part); break;
    case 3: decode_part<V, 3>(m, group, part); break;
    case 4: decode_part<V, 4>(m, group, part); break;
    default: decode_part<V, 8>(m, group, part); break;
  }
  if (m.spec.block_size == 0) return;
  const std::int64_t begin = part.first * kChunk / m.spec.block_size;
  const std::int64_t end = (part.first + part.chunks) * kChunk;
  float* to = part.scales;
  std::int64_t b = begin;
  for (; b < m.sizes.blocks && b * m.spec.block_size < end; ++b, to += 2 * kLanes) {
    for (std::int64_t p = 0; p < 2; ++p) {
      const std::int64_t panel = 2 * group + (p < part.panels ? p : 0);
      for (int i = 0; i < kLanes; i += V::kWidth) {
        V::store_f(to + p * kLanes + i, V::half(m.scales + (panel * m.sizes.blocks + b) * kLanes + i));
      }
    }
  }
  // A block of nothing but padding has no scale, and what lay here before may be a NaN.
  for (; b * m.spec.block_size < end; ++b, to += 2 * kLanes) {
    for (int i = 0; i < 2 * kLanes; i += V::kWidth) V::store_f(to + i, V::zero_f());
  }
}

// `rows` rows (within one tile of kRowTile) by `vectors` vectors. D::dot<wide>(acc, w, a): one quad, a in each lane.
template <class V, class D, int rows, int vectors, bool wide>
BDQ_INLINE inline void quads(typename V::I (&acc)[rows][vectors], const std::int8_t* a, const std::uint8_t* w, std::int64_t stride,
                             int count) {
#pragma GCC unroll 4
  for (int q = 0; q < count; ++q, a += 4, w += 64) {
    typename V::I codes[vectors];
    each<vectors>([&](auto v) BDQ_INLINE { codes[v.value] = V::load(w + v.value * stride); });
    each<rows>([&](auto i) BDQ_INLINE {
      std::int32_t four;
      __builtin_memcpy(&four, a + i.value * kChunk, 4);
      const typename V::I all = V::all32(four);
      each<vectors>([&](auto v) BDQ_INLINE {
        acc[i.value][v.value] = D::template dot<wide>(acc[i.value][v.value], codes[v.value], all);
      });
    });
  }
}

// The same for 4 quads, sums of pairs of products added in 16 bits.
template <class V, class D, int rows, int vectors>
BDQ_INLINE inline void four_quads(typename V::I (&pairs)[rows][vectors], const std::int8_t* a, const std::uint8_t* w, std::int64_t stride) {
  each<4>([&](auto q) BDQ_INLINE {
    typename V::I codes[vectors];
    each<vectors>([&](auto v) BDQ_INLINE { codes[v.value] = V::load(w + q.value * 64 + v.value * stride); });
    each<rows>([&](auto i) BDQ_INLINE {
      const typename V::I all = D::quad(a + i.value * kChunk + q.value * 4);
      each<vectors>([&](auto v) BDQ_INLINE { pairs[i.value][v.value] = D::add_pairs(pairs[i.value][v.value], codes[v.value], all); });
    });
  });
}

// Steps [begin, end) of a part.
template <class V, class D, int rows, int vectors, bool wide>
BDQ_INLINE inline void multiply_steps(typename V::I (&acc)[rows][vectors], const std::int8_t* a, const std::uint8_t* w, std::int64_t stride,
                             std::int64_t begin, std::int64_t end, std::int64_t pair_quads) {
  if constexpr (D::kPairs && !wide) {
    for (std::int64_t q = 8 * begin; q < 8 * end;) {
      const std::int64_t stop = q + pair_quads < 8 * end ? q + pair_quads : 8 * end;
      typename V::I pairs[rows][vectors];
      each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE { pairs[i.value][v.value] = V::zero(); });
      for (; q < stop; q += 4) four_quads<V, D, rows, vectors>(pairs, a + (q >> 4) * kRowTile * kChunk + (q & 15) * 4, w + q * 64, stride);
      each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE {
        acc[i.value][v.value] = V::add32(acc[i.value][v.value], D::widened(pairs[i.value][v.value]));
      });
    }
  } else {
    std::int64_t s = begin;
    for (; s + 2 <= end; s += 2) quads<V, D, rows, vectors, wide>(acc, a + s / 2 * kRowTile * kChunk, w + s * 512, stride, 16);
    if (s < end) quads<V, D, rows, vectors, wide>(acc, a + s / 2 * kRowTile * kChunk + s % 2 * kStep, w + s * 512, stride, 8);
  }
}

template <class V, class D, int rows, int vectors, bool wide>
void tile_channels(const Multiplication& m, const Part& part, std::int64_t row, const std::uint8_t* w, std::int64_t stride,
                   std::int64_t out_stride, std::int32_t* out) {
  typename V::I acc[rows][vectors];
  each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE {
    acc[i.value][v.value] = part.start ? V::zero() : V::load(out + i.value * 32 + v.value * out_stride);
  });
  const std::int8_t* a = m.codes(row) + part.first * kRowTile * kChunk;
  multiply_steps<V, D, rows, vectors, wide>(acc, a, w, stride, 0, 2 * part.chunks, part.pair_quads);
  each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE {
    V::store(out + i.value * 32 + v.value * out_stride, acc[i.value][v.value]);
  });
}

template <class V, class D, int rows, int vectors, bool wide>
void tile_blocks(const Multiplication& m, const Part& part, std::int64_t row, const std::uint8_t* w, std::int64_t stride,
                 std::int64_t out_stride, std::int32_t* out) {
  const std::int64_t steps_each = m.spec.block_size / kStep, steps = 2 * part.chunks, sum_count = m.sum_count;
  const std::int64_t skipped = part.first * kChunk / m.spec.block_size, blocks = sum_count - skipped;
  const std::int32_t* offsets = m.a.offsets + row * sum_count + skipped;
  const std::int8_t* a = m.codes(row) + part.first * kRowTile * kChunk;
  auto* sums = reinterpret_cast<float*>(out);
  const float* scales = part.scales + (w - part.codes) / (part.chunks * 1024) * kLanes;
  bool start = part.start;
  for (std::int64_t b = 0; b < blocks && b * steps_each < steps; ++b, start = false) {
    typename V::I acc[rows][vectors];
    each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE { acc[i.value][v.value] = V::all32(offsets[i.value * sum_count + b]); });
    const std::int64_t end = (b + 1) * steps_each < steps ? (b + 1) * steps_each : steps;
    multiply_steps<V, D, rows, vectors, wide>(acc, a, w, stride, b * steps_each, end, part.pair_quads);
    each_pair<rows, vectors>([&](auto i, auto v) BDQ_INLINE {
      float* sum = sums + i.value * 32 + v.value * out_stride;
      const auto before = start ? V::zero_f() : V::load_f(sum);
      V::store_f(sum, V::fmadd(V::to_f(acc[i.value][v.value]), V::load_f(scales + b * 32 + v.value * out_stride), before));
    });
  }
}

template <class V, class D, int rows, bool wide>
inline void tile(const Multiplication& m, const Part& part, std::int64_t row, std::int32_t* out) {
  const bool blocks = m.spec.block_size != 0;
  const auto run = [&](auto vectors, const std::uint8_t* w, std::int64_t stride, std::int64_t out_stride, std::int32_t* to) {
    constexpr int kVectors = decltype(vectors)::value;
    blocks ? tile_blocks<V, D, rows, kVectors, wide>(m, part, row, w, stride, out_stride, to)
           : tile_channels<V, D, rows, kVectors, wide>(m, part, row, w, stride, out_stride, to);
  };
  const std::int64_t panel = part.chunks * 1024;
  if constexpr (V::kWidth == 16) {
    part.panels == 2 ? run(Count<2>{}, part.codes, panel, kLanes, out) : run(Count<1>{}, part.codes, panel, kLanes, out);
  } else {
    for (std::int64_t p = 0; p < part.panels; ++p) run(Count<2>{}, part.codes + p * panel, 32, V::kWidth, out + p * kLanes);
  }
}

template <class V, class D, bool wide>
void rows_by_vectors(const Multiplication& m, const Part& part, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  std::int64_t row = begin;
  if constexpr (V::kWidth == 16) {
    for (; row + 8 <= end; row += 8) tile<V, D, 8, wide>(m, part, row, out + (row - begin) * 32);
  }
  for (; row + 4 <= end; row += 4) tile<V, D, 4, wide>(m, part, row, out + (row - begin) * 32);
  for (; row + 2 <= end; row += 2) tile<V, D, 2, wide>(m, part, row, out + (row - begin) * 32);
  if (row < end) tile<V, D, 1, wide>(m, part, row, out + (row - begin) * 32);
}

// How columns are cut: parts of a similar number of chunks that the first-level cache holds, blocks whole.
inline std::int64_t part_chunks(const Multiplication& m, std::int64_t most) {
  const std::int64_t unit = m.spec.block_size > kChunk ? m.spec.block_size / kChunk : 1;
  const std::int64_t parts = (m.sizes.chunks + most - 1) / most;
  return ((m.sizes.chunks + parts - 1) / parts + unit - 1) / unit * unit;
}

constexpr std::int64_t kMostChunks = 16;

struct GemmScratch {
  std::size_t codes, scales, accumulators;  // bytes of each
  std::size_t each;                         // accumulators of one group
  std::size_t total() const { return codes + scales + accumulators; }
};

inline GemmScratch gemm_scratch(std::int64_t rows, std::int64_t groups) {
  GemmScratch found{};
  const std::int64_t padded = (rows + 2 * kRowTile - 1) / (2 * kRowTile) * 2 * kRowTile;
  found.codes = 2 * (kMostChunks + 4) * 1024;
  found.scales = 2 * (kMostChunks + 4) * 32 * sizeof(float);
  found.each = static_cast<std::size_t>(padded) * 32 * sizeof(std::int32_t);
  found.accumulators = found.each * static_cast<std::size_t>(groups);
  return found;
}

// For each part of the columns and each group: decoded(part) once its codes are there, then rows(part, begin, end, accumulators) for 32
// rows at a time. Accumulators go through memory between parts only.
template <class V, class Decoded, class Rows>
void multiply_many(const Multiplication& m, std::int64_t begin, std::int64_t end, std::int64_t group_begin, std::int64_t group_end,
                   std::uint8_t* scratch, std::int64_t most_chunks, Decoded&& decoded, Rows&& rows) {
  const GemmScratch size = gemm_scratch(end - begin, group_end - group_begin);
  Part part;
  part.codes = scratch;
  part.pair_quads = pair_quads(m.spec);
  part.scales = reinterpret_cast<float*>(scratch + size.codes);
  auto* accumulators = reinterpret_cast<std::int32_t*>(scratch + size.codes + size.scales);
  const std::int64_t each = part_chunks(m, most_chunks), each_group = static_cast<std::int64_t>(size.each / sizeof(std::int32_t));
  for (part.first = 0; part.first < m.sizes.chunks; part.first += each) {
    part.chunks = each < m.sizes.chunks - part.first ? each : m.sizes.chunks - part.first;
    part.start = part.first == 0;
    const bool last = part.first + part.chunks == m.sizes.chunks, only = part.start && last;
    for (std::int64_t group = group_begin; group < group_end; ++group) {
      part.panels = 2 * group + 1 < m.sizes.panels ? 2 : 1;
      decode_part<V>(m, group, part);
      decoded(part);
      Group of;
      if (last) load_group<V>(m, group, &of);
      for (std::int64_t row = begin; row < end; row += 32) {
        const std::int64_t to = row + 32 < end ? row + 32 : end;
        std::int32_t* out = only ? accumulators : accumulators + (group - group_begin) * each_group + (row - begin) * 32;
        rows(part, row, to, out);
        if (last) finish_rows<V>(m, of, group, row, to, out);
      }
    }
  }
}
