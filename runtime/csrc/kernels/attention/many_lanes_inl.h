// Attention of many lanes (a prompt): blocks of keys are dequantized once for all lanes; a Vec holds one value of kWidth lanes, so that
// softmax needs no sum across a Vec. In the operations of vectors_*.h: included in the namespace of one instruction set.

constexpr std::int64_t kGroup = 2 * kWidth;  // lanes that go through the matrix products together

struct ManyLanes {
  float* queries;              // [groups, D, kGroup]
  float* o;                    // [groups, D, kGroup]
  float *m, *l;                // [groups, kGroup]
  std::int32_t *first, *last;  // [groups, kGroup]: keys that a lane sees
  float *keys, *values;        // [kKeys, D]
  float* logits;               // [kKeys, kGroup]
  float* rows;                 // [8, D]

  ManyLanes(Carver& carver, std::int64_t D, std::int64_t lanes) {
    const std::int64_t padded = round_up(lanes, kGroup);
    queries = carver.take<float>(padded * D);
    o = carver.take<float>(padded * D);
    m = carver.take<float>(padded);
    l = carver.take<float>(padded);
    first = carver.take<std::int32_t>(padded);
    last = carver.take<std::int32_t>(padded);
    keys = carver.take<float>(kKeys * D);
    values = carver.take<float>(kKeys * D);
    logits = carver.take<float>(kKeys * kGroup);
    rows = carver.take<float>(8 * D);
  }
};

// C[r][0 .. kGroup) = (kAdd: C +) Σ_k A(r, k) B[k][0 .. kGroup) for r < kTileRows, A(r, k) = a[r * row_step + k * step].
template <bool kAdd>
BDQ_VECTOR void multiply_tile(const float* a, std::int64_t row_step, std::int64_t step, const float* b, std::int64_t count, float* c) {
  Vec sums[kTileRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    sums[r][0] = kAdd ? load(c + r * kGroup) : set1(0.0f);
    sums[r][1] = kAdd ? load(c + r * kGroup + kWidth) : set1(0.0f);
  }
  for (std::int64_t k = 0; k < count; ++k) {
    const Vec b0 = load(b + k * kGroup), b1 = load(b + k * kGroup + kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x = set1(a[r * row_step + k * step]);
      sums[r][0] = fma(x, b0, sums[r][0]);
      sums[r][1] = fma(x, b1, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    store(c + r * kGroup, sums[r][0]);
    store(c + r * kGroup + kWidth, sums[r][1]);
  }
}

BDQ_VECTOR void prepare_lanes(const Problem& problem, const Block& block, const ManyLanes& lanes) {
  const std::int64_t D = problem.spec.head_size, past = problem.past(block.batch), padded = round_up(block.count, kGroup);
  const float factor = Factors(problem.spec).query;
  for (std::int64_t n = 0; n < padded; n += 8) {
    for (std::int64_t i = n; i < n + 8; ++i) {
      float* row = lanes.rows + (i - n) * D;
      lanes.m[i] = kNothingSeen;
      lanes.l[i] = 0.0f;
      if (i >= block.count) {  // padding sees all, and its results are left behind
        for (std::int64_t d = 0; d < D; ++d) row[d] = 0.0f;
        lanes.first[i] = 0;
        lanes.last[i] = INT32_MAX;
        continue;
      }
      const std::int64_t lane = block.first + i;
      const Seen seen(problem, past, lane);
      lanes.first[i] = static_cast<std::int32_t>(seen.first);
      lanes.last[i] = static_cast<std::int32_t>(seen.last);
      prepare_head(problem, kernels, problem.query(block.batch, block.kv_head, lane), seen.last, row);
      for (std::int64_t d = 0; d < D; ++d) row[d] *= factor;
    }
    float* queries = lanes.queries + n / kGroup * kGroup * D + n % kGroup;
    for (std::int64_t d = 0; d < D; d += 8) transpose8(lanes.rows + d, D, queries + d * kGroup, kGroup);
  }
  for (std::int64_t i = 0; i < padded * D; ++i) lanes.o[i] = 0.0f;
}

// Logits of keys begin .. end - 1 of one step to their weights, lane by lane; m, l and o follow the new largest logit.
BDQ_VECTOR void softmax_step(const Problem& problem, const ManyLanes& lanes, std::int64_t group, std::int64_t key, std::int64_t begin,
                             std::int64_t end, bool masked) {
  const float cap = Factors(problem.spec).cap;
  for (std::int64_t part = 0; part < kGroup; part += kWidth) {
    const std::int64_t at = group * kGroup + part;
    const Ints first = load_ints(lanes.first + at), last = load_ints(lanes.last + at);
    float* logits = lanes.logits + part;
    const Vec before = load(lanes.m + at);
    Vec m = before;
    for (std::int64_t j = begin; j < end; ++j) {
      Vec z = load(logits + j * kGroup);
      if (cap > 0.0f) z = mul(tanh_of(z), set1(cap));
      if (masked) z = visible(z, static_cast<std::int32_t>(key + j), first, last);
      if (cap > 0.0f || masked) store(logits + j * kGroup, z);
      m = max(m, z);
    }
    const Vec keep = exp2_of(sub(before, m));
    Vec l = mul(load(lanes.l + at), keep);
    for (std::int64_t j = begin; j < end; ++j) {
      const Vec p = exp2_of(sub(load(logits + j * kGroup), m));
      l = add(l, p);
      store(logits + j * kGroup, p);
    }
    store(lanes.m + at, m);
    store(lanes.l + at, l);
    if (any_less(keep, set1(1.0f))) {
      float* o = lanes.o + group * kGroup * problem.spec.head_size + part;
      for (std::int64_t d = 0; d < problem.spec.head_size; ++d) store(o + d * kGroup, mul(load(o + d * kGroup), keep));
    }
  }
}

// One step of keys (key .. key + count - 1, in lanes.keys and lanes.values) for the lanes of one group.
BDQ_VECTOR void attend_group(const Problem& problem, const Block& block, const ManyLanes& lanes, std::int64_t group, std::int64_t key,
                             std::int64_t count) {
  const std::int64_t D = problem.spec.head_size, from = group * kGroup, to = lesser(from + kGroup, block.count) - 1;
  // Lanes are in the order of their tokens, so the first and the last one bound what the group sees.
  const std::int64_t begin = greater(0, lanes.first[from] - key) / kTileRows * kTileRows;
  const std::int64_t end = round_up(lesser(count, lanes.last[to] - key + 1), kTileRows);
  if (begin >= end) return;
  const bool masked = key + end - 1 > lanes.last[from] || key + begin < lanes.first[to];
  const float* queries = lanes.queries + group * kGroup * D;
  float* o = lanes.o + group * kGroup * D;
  for (std::int64_t j = begin; j < end; j += kTileRows)
    multiply_tile<false>(lanes.keys + j * D, D, 1, queries, D, lanes.logits + j * kGroup);
  softmax_step(problem, lanes, group, key, begin, end, masked);
  for (std::int64_t d = 0; d < D; d += kTileRows) {
    multiply_tile<true>(lanes.values + begin * D + d, 1, D, lanes.logits + begin * kGroup, end - begin, o + d * kGroup);
  }
}

BDQ_VECTOR void attend_many(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  const AttentionSpec& spec = problem.spec;
  const std::int64_t D = spec.head_size;
  Carver carver(scratch);
  const ManyLanes lanes(carver, D, block.count);
  prepare_lanes(problem, block, lanes);
  const std::int64_t groups = round_up(block.count, kGroup) / kGroup;
  for (std::int64_t key = block.key_begin / kKeys * kKeys; key < block.key_end; key += kKeys) {
    const std::int64_t count = lesser(kKeys, block.key_end - key);
    for (std::int64_t j = 0; j < count; ++j) {
      dequantize_cache_row(problem.present_key(block.batch, block.kv_head, key + j), lanes.keys + j * D, D, spec.key_bits, problem.isa);
      dequantize_cache_row(problem.present_value(block.batch, block.kv_head, key + j), lanes.values + j * D, D, spec.value_bits,
                           problem.isa);
    }
    for (std::int64_t i = count * D; i < round_up(count, kTileRows) * D; ++i) lanes.keys[i] = lanes.values[i] = 0.0f;
    for (std::int64_t group = 0; group < groups; ++group) attend_group(problem, block, lanes, group, key, count);
  }
  for (std::int64_t n = 0; n < block.count; ++n) {
    partial.m[n] = lanes.m[n];
    partial.l[n] = lanes.l[n];
  }
  for (std::int64_t n = 0; n < block.count; n += 8) {
    const float* o = lanes.o + n / kGroup * kGroup * D + n % kGroup;
    const std::int64_t rows = lesser(8, block.count - n);
    float* to = rows == 8 ? partial.o + n * D : lanes.rows;
    for (std::int64_t d = 0; d < D; d += 8) transpose8(o + d * kGroup, kGroup, to + d, D);
    if (rows < 8) memcpy(partial.o + n * D, lanes.rows, static_cast<std::size_t>(rows * D) * sizeof(float));
  }
}
