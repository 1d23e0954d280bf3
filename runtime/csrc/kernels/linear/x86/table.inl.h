// The functions of LinearKernels for vectors V and dot products D. Included in the anonymous namespace of a file that has set its
// target.

constexpr std::int64_t kMostGroups = 16;  // accumulators of so many groups are kept at once

template <class V, class D>
void multiply_integers(const Multiplication& m, std::int64_t begin, std::int64_t end, std::int64_t group_begin, std::int64_t group_end,
                       std::uint8_t* scratch) {
  const auto rows = m.spec.weight_bits == 8 ? rows_by_vectors<V, D, true> : rows_by_vectors<V, D, false>;
  multiply_many<V>(
      m, begin, end, group_begin, group_end, scratch, kMostChunks, [](const Part&) {},
      [&](const Part& part, std::int64_t from, std::int64_t to, std::int32_t* out) { rows(m, part, from, to, out); });
}

// At most kMostGroups groups at once, so that accumulators stay in the second-level cache; one at a time for few rows, so that the
// weight is read from one end to the other.
template <class Run> void in_spans(const Multiplication& m, std::int64_t begin, std::int64_t end, Run&& run) {
  const std::int64_t span = m.a.M <= 4 * kRowTile ? 1 : kMostGroups;
  for (std::int64_t first = begin; first < end; first += span) run(first, first + span < end ? first + span : end);
}

template <class V, class D>
void multiply(const Multiplication& m, std::int64_t begin, std::int64_t end, std::int64_t group_begin, std::int64_t group_end,
              std::uint8_t* scratch) {
  if (m.a.M <= kGemvRows) {
    if (m.spec.activation_bits == 16) return multiply_real<V>(m, begin, end, group_begin, group_end, scratch);
    return multiply_few<V, D>(m, group_begin, group_end);
  }
  in_spans(m, group_begin, group_end, [&](std::int64_t from, std::int64_t to) {
    if (m.spec.activation_bits == 16) return multiply_real<V>(m, begin, end, from, to, scratch);
    multiply_integers<V, D>(m, begin, end, from, to, scratch);
  });
}

inline std::size_t scratch_bytes(const Multiplication& m, std::int64_t rows) {
  if (m.a.M <= kGemvRows) return 64;
  return kRealBytes + gemm_scratch(rows, kMostGroups).total();
}

template <class V> void hadamard(const float* x, const float* diagonal, float* y, std::int64_t K, int size) {
  hadamard_into<V>(x, diagonal, y, K, size);
}

template <class V>
float quantize(const float* x, std::int64_t K, std::int64_t padded_K, int bits, float clip, const RowTarget& to) {
  return quantize_row_into<V>(x, K, padded_K, bits, clip, to);
}
