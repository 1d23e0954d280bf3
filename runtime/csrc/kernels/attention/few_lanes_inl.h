// Attention of few lanes (one new token): products of queries and codes, scale and zero point of a key taken out of the sum:
// q · k = s (Σ q code - z Σ q). In the operations of vectors_*.h: included in the namespace of one instruction set.

constexpr std::int64_t kPair = 2 * kWidth;  // channels are padded to this

struct FewLanes {
  float* queries;  // [count, padded]
  float* totals;   // [count]: Σ q
  float* o;        // [count, padded]
  float* weights;  // [count, kKeys]: logits, then softmax weights times the scale of the value
  StepGrids grids;
  std::uint8_t *keys, *values;  // [kKeys, padded]: codes

  FewLanes(Carver& carver, std::int64_t padded, std::int64_t lanes) {
    queries = carver.take<float>(lanes * padded);
    totals = carver.take<float>(lanes);
    o = carver.take<float>(lanes * padded);
    weights = carver.take<float>(lanes * kKeys);
    grids = take_grids(carver);
    keys = carver.take<std::uint8_t>(kKeys * padded);
    values = carver.take<std::uint8_t>(kKeys * padded);
  }
};

// Codes, scales and zero points of `count` rows; up to a multiple of four, rows are 0.
BDQ_VECTOR void unpack_rows(const std::uint8_t* row, std::int64_t row_bytes, std::int64_t D, std::int64_t padded, int bits,
                            std::int64_t count, std::uint8_t* codes, float* scales, float* zeros) {
  for (std::int64_t j = 0; j < count; ++j, row += row_bytes) {
    unpack_codes(row, codes + j * padded, D, bits);
    scales[j] = cache_rows::scale_of(row + row_bytes - 4);
    zeros[j] = static_cast<float>(cache_rows::zero_point_of(row + row_bytes - 4));
  }
  for (std::int64_t j = count; j < round_up(count, 4); ++j) {
    for (std::int64_t i = 0; i < padded; ++i) codes[j * padded + i] = 0;
  }
  for (std::int64_t j = count; j < kKeys; ++j) scales[j] = zeros[j] = 0.0f;
}

// Σ q code of kLanes lanes and `count` keys.
template <int kLanes>
BDQ_VECTOR void dot_codes(const float* queries, std::int64_t padded, const std::uint8_t* codes, std::int64_t count, float* dots) {
  for (std::int64_t j = 0; j < count; j += 4) {
    Vec sums[kLanes][4];
#pragma GCC unroll 4
    for (int n = 0; n < kLanes; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = set1(0.0f);
    for (std::int64_t d = 0; d < padded; d += kWidth) {
      Vec code[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) code[i] = load_codes(codes + (j + i) * padded + d);
#pragma GCC unroll 4
      for (int n = 0; n < kLanes; ++n) {
        const Vec q = load(queries + n * padded + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[n][i] = fma(q, code[i], sums[n][i]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kLanes; ++n) store_sums4(dots + n * kKeys + j, sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
  }
}

// o = o * keep + Σ_j weights[j] code[j] - offset, for kLanes lanes.
template <int kLanes>
BDQ_VECTOR void add_codes(const float* weights, const float* keep, const float* offset, const std::uint8_t* codes, std::int64_t padded,
                          std::int64_t count, float* o) {
  for (std::int64_t d = 0; d < padded; d += kPair) {
    Vec sums[kLanes][2];
#pragma GCC unroll 4
    for (int n = 0; n < kLanes; ++n) sums[n][0] = sums[n][1] = set1(0.0f);
    for (std::int64_t j = 0; j < count; ++j) {
      const Vec a = load_codes(codes + j * padded + d), b = load_codes(codes + j * padded + d + kWidth);
#pragma GCC unroll 4
      for (int n = 0; n < kLanes; ++n) {
        const Vec weight = set1(weights[n * kKeys + j]);
        sums[n][0] = fma(weight, a, sums[n][0]);
        sums[n][1] = fma(weight, b, sums[n][1]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kLanes; ++n) {
      float* to = o + n * padded + d;
      const Vec kept = set1(keep[n]), less = set1(offset[n]);
      store(to, fma(load(to), kept, sub(sums[n][0], less)));
      store(to + kWidth, fma(load(to + kWidth), kept, sub(sums[n][1], less)));
    }
  }
}

template <int kLanes>
BDQ_VECTOR void attend_tile(const Problem& problem, const Block& block, const FewLanes& lanes, std::int64_t padded, std::int64_t n,
                            std::int64_t key, std::int64_t count, Partial partial) {
  const std::int64_t past = problem.past(block.batch);
  float keep[kLanes], offset[kLanes];
  dot_codes<kLanes>(lanes.queries + n * padded, padded, lanes.keys, count, lanes.weights + n * kKeys);
  for (int i = 0; i < kLanes; ++i) {
    const Seen seen(problem, past, block.first + n + i);
    softmax_row<kKeys>(problem, lanes.grids, seen, key, count, lanes.totals[n + i], lanes.weights + (n + i) * kKeys, partial, n + i,
                       keep + i, offset + i);
  }
  add_codes<kLanes>(lanes.weights + n * kKeys, keep, offset, lanes.values, padded, count, lanes.o + n * padded);
}

BDQ_VECTOR void attend_few(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  const AttentionSpec& spec = problem.spec;
  const std::int64_t D = spec.head_size, padded = round_up(D, kPair), past = problem.past(block.batch);
  const float factor = Factors(spec).query;
  Carver carver(scratch);
  const FewLanes lanes(carver, padded, block.count);
  for (std::int64_t n = 0; n < block.count; ++n) {
    const std::int64_t lane = block.first + n;
    float* query = lanes.queries + n * padded;
    prepare_head(problem, kernels, problem.query(block.batch, block.kv_head, lane), past + lane / problem.group, query);
    for (std::int64_t d = D; d < padded; ++d) query[d] = 0.0f;
    for (std::int64_t d = 0; d < padded; ++d) lanes.o[n * padded + d] = 0.0f;
    lanes.totals[n] = scale_row(query, padded, factor);
    partial.m[n] = kNothingSeen;
    partial.l[n] = 0.0f;
  }
  for (std::int64_t i = 0; i < kKeys * padded; ++i) lanes.keys[i] = lanes.values[i] = 0;  // channels that are padding
  for (std::int64_t key = block.key_begin / kKeys * kKeys; key < block.key_end; key += kKeys) {
    const std::int64_t count = lesser(kKeys, block.key_end - key), rounded = round_up(count, 4);
    unpack_rows(problem.present_key(block.batch, block.kv_head, key), problem.key_row, D, padded, spec.key_bits, count, lanes.keys,
                lanes.grids.key_scales, lanes.grids.key_zeros);
    unpack_rows(problem.present_value(block.batch, block.kv_head, key), problem.value_row, D, padded, spec.value_bits, count, lanes.values,
                lanes.grids.value_scales, lanes.grids.value_zeros);
    std::int64_t n = 0;
    for (; n + kFewTile <= block.count; n += kFewTile) attend_tile<kFewTile>(problem, block, lanes, padded, n, key, rounded, partial);
    switch (block.count - n) {
      case 3: attend_tile<3>(problem, block, lanes, padded, n, key, rounded, partial); break;
      case 2: attend_tile<2>(problem, block, lanes, padded, n, key, rounded, partial); break;
      case 1: attend_tile<1>(problem, block, lanes, padded, n, key, rounded, partial); break;
    }
  }
  for (std::int64_t n = 0; n < block.count; ++n) {
    memcpy(partial.o + n * D, lanes.o + n * padded, static_cast<std::size_t>(D) * sizeof(float));
  }
}
