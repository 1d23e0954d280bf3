// Attention of many lanes with AMX: sixteen lanes are the columns of a tile, keys and channels its rows. Codes are exact in bfloat16;
// queries and softmax weights are sums of three of them, so that products are those of float32.
#if defined(__x86_64__)

#include <cpuid.h>

#include <cstring>

#include "../rows.h"
#include "amx_few.h"
#include "amx_parts.h"
#include "amx_rows.h"
#include "lanes.h"
#include "vector_tables.h"

namespace bdq::attention::amx {
namespace {

using namespace avx512;

#include "functions_inl.h"

struct Lanes {
  Half* queries;               // [groups, chunks, kQueryParts, kTile]
  float* totals;               // [groups, 16]: Σ q
  float* o;                    // [groups, channels, 16]
  float *m, *l;                // [groups, 16]
  std::int32_t *first, *last;  // [groups, 16]: keys that a lane sees
  Half *keys, *values;         // as unpack_keys and unpack_values have them
  StepGrids grids;             // zero points are what is left of them
  float* ones;                 // [64]
  float* logits;               // [64, 16]
  Half* weights;               // [kKeyChunks, kWeightParts, kTile]
  float* rows;                 // [16, padded]: prepared queries
  Half* words;                 // [64, padded]
  std::uint8_t* codes;         // [padded]

  Lanes(Carver& carver, std::int64_t D, std::int64_t lanes) {
    const std::int64_t padded = round_up(D, kDepth), columns = round_up(lanes, kRows);
    queries = carver.take<Half>(columns * padded * kQueryParts);
    totals = carver.take<float>(columns);
    o = carver.take<float>(columns * padded);
    m = carver.take<float>(columns);
    l = carver.take<float>(columns);
    first = carver.take<std::int32_t>(columns);
    last = carver.take<std::int32_t>(columns);
    keys = carver.take<Half>(kKeys * padded);
    values = carver.take<Half>(kKeys * padded);
    grids = take_grids(carver);
    ones = carver.take<float>(kKeys);
    logits = carver.take<float>(kKeys * kRows);
    weights = carver.take<Half>(kKeyChunks * kWeightParts * kTile);
    rows = carver.take<float>(kRows * padded);
    words = carver.take<Half>(kKeys * padded);
    codes = carver.take<std::uint8_t>(padded);
  }
};

// Prepared rows of sixteen lanes to tiles: row r of a part holds channels 2 r and 2 r + 1 of each lane.
BDQ_VECTOR void pack_queries(const float* rows, std::int64_t padded, Half* queries) {
  for (std::int64_t d = 0; d < padded; d += kDepth, queries += kQueryParts * kTile) {
    __m512i parts[kQueryParts][16];
    for (int n = 0; n < 16; ++n) {
      __m512i row[kQueryParts];
      split32(rows + n * padded + d, row);
      for (int part = 0; part < kQueryParts; ++part) parts[part][n] = row[part];
    }
    for (int part = 0; part < kQueryParts; ++part) {
      transpose16(parts[part]);
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(queries + part * kTile + r * kDepth, parts[part][r]);
    }
  }
}

BDQ_VECTOR void prepare_lanes(const Problem& problem, const Block& block, const Lanes& lanes) {
  const std::int64_t D = problem.spec.head_size, padded = round_up(D, kDepth), past = problem.past(block.batch);
  const std::int64_t columns = round_up(block.count, kRows);
  const float factor = Factors(problem.spec).query;
  for (std::int64_t i = 0; i < columns; ++i) {
    float* row = lanes.rows + i % kRows * padded;
    lanes.m[i] = kNothingSeen;
    lanes.l[i] = 0.0f;
    lanes.first[i] = 0;
    lanes.last[i] = INT32_MAX;  // padding sees all, and its results are left behind
    if (i < block.count) {
      const Seen seen(problem, past, block.first + i);
      lanes.first[i] = static_cast<std::int32_t>(seen.first);
      lanes.last[i] = static_cast<std::int32_t>(seen.last);
      prepare_head(problem, avx512::kernels, problem.query(block.batch, block.kv_head, block.first + i), seen.last, row);
    }
    for (std::int64_t d = i < block.count ? D : 0; d < padded; ++d) row[d] = 0.0f;
    lanes.totals[i] = scale_row(row, padded, factor);
    if (i % kRows == kRows - 1) pack_queries(lanes.rows, padded, lanes.queries + i / kRows * kRows * padded * kQueryParts);
  }
  memset(lanes.o, 0, static_cast<std::size_t>(columns * padded) * sizeof(float));
  memset(lanes.codes, 0, static_cast<std::size_t>(padded));
  for (std::int64_t j = 0; j < kKeys; ++j) lanes.ones[j] = 1.0f;
}

// Where logits are more than product times scale: remainders of zero points, softcap, keys that are not seen.
BDQ_VECTOR void complete_logits(const Problem& problem, const Lanes& lanes, bool remainders, std::int64_t at, std::int64_t key,
                                std::int64_t begin, std::int64_t end) {
  const float cap = Factors(problem.spec).cap;
  const Vec total = load(lanes.totals + at);
  const Ints first = load_ints(lanes.first + at), last = load_ints(lanes.last + at);
  for (std::int64_t j = begin; j < end; ++j) {
    Vec z = load(lanes.logits + j * kRows);
    if (remainders) z = fnma(set1(lanes.grids.key_zeros[j]), total, z);
    z = mul(z, set1(lanes.grids.key_scales[j]));
    if (cap > 0.0f) z = mul(tanh_of(z), set1(cap));
    store(lanes.logits + j * kRows, visible(z, static_cast<std::int32_t>(key + j), first, last));
  }
}

BDQ_VECTOR Vec largest_logits(const Lanes& lanes, const float* scales, std::int64_t begin, std::int64_t end, Vec m) {
  Vec a = m, b = m, c = m, d = m;
  for (std::int64_t j = begin; j < end; j += 4) {
    const float* z = lanes.logits + j * kRows;
    a = max(a, mul(load(z), set1(scales[j])));
    b = max(b, mul(load(z + 16), set1(scales[j + 1])));
    c = max(c, mul(load(z + 32), set1(scales[j + 2])));
    d = max(d, mul(load(z + 48), set1(scales[j + 3])));
  }
  return max(max(a, b), max(c, d));
}

// Softmax weights times value scales of keys begin .. end - 1 as tiles; returns the sum of the weights.
BDQ_VECTOR Vec make_weights(const Lanes& lanes, const float* scales, std::int64_t begin, std::int64_t end, Vec m) {
  Vec even = set1(0.0f), odd = even;
  for (std::int64_t j = begin; j < end; j += 2) {
    const Vec p = exp2_of(_mm512_fmsub_ps(load(lanes.logits + j * kRows), set1(scales[j]), m));
    const Vec q = exp2_of(_mm512_fmsub_ps(load(lanes.logits + j * kRows + 16), set1(scales[j + 1]), m));
    even = add(even, p);
    odd = add(odd, q);
    Vec a = mul(p, set1(lanes.grids.value_scales[j])), b = mul(q, set1(lanes.grids.value_scales[j + 1]));
    Half* to = lanes.weights + j / kDepth * kWeightParts * kTile + j % kDepth * kRows;
#pragma GCC unroll 3
    for (int part = 0; part < kWeightParts; ++part, to += kTile) {
      _mm512_storeu_si512(to, upper_pair(_mm512_castps_si512(a), _mm512_castps_si512(b)));
      a = without_upper(a);
      b = without_upper(b);
    }
  }
  return add(even, odd);
}

// o = o * keep - offset, offset being the same for all channels.
BDQ_VECTOR void rescale(float* o, std::int64_t channels, Vec keep, Vec offset) {
  for (std::int64_t d = 0; d < channels; ++d) store(o + d * kRows, _mm512_fmsub_ps(load(o + d * kRows), keep, offset));
}

// What remainders of value zero points take from each channel: Σ weight * remainder, of the weights as they were stored.
BDQ_VECTOR Vec value_offset(const Lanes& lanes, std::int64_t begin, std::int64_t end) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  Vec sum = set1(0.0f);
  for (std::int64_t j = begin; j < end; j += 2) {
    const Half* from = lanes.weights + j / kDepth * kWeightParts * kTile + j % kDepth * kRows;
    for (std::int64_t part = 0; part < kWeightParts; ++part) {
      const __m512i pair = _mm512_loadu_si512(from + part * kTile);
      sum = fma(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), set1(lanes.grids.value_zeros[j]), sum);
      sum = fma(_mm512_castsi512_ps(_mm512_and_si512(pair, upper)), set1(lanes.grids.value_zeros[j + 1]), sum);
    }
  }
  return sum;
}

struct Step {
  std::int64_t key, count;  // keys of this step
  bool key_remainders, value_remainders;
};

BDQ_VECTOR void attend_group(const Problem& problem, const Block& block, const Lanes& lanes, std::int64_t group, const Step& step) {
  const std::int64_t padded = round_up(problem.spec.head_size, kDepth), channels = round_up(problem.spec.head_size, kRows);
  const std::int64_t at = group * kRows, to = lesser(at + kRows, block.count) - 1;
  // Lanes are in the order of their tokens, so the first and the last one bound what the group sees.
  const std::int64_t begin = greater(0, lanes.first[at] - step.key) / kRows * kRows;
  const std::int64_t end = round_up(lesser(step.count, lanes.last[to] - step.key + 1), kRows);
  if (begin >= end) return;
  const bool masked = step.key + end - 1 > lanes.last[at] || step.key + begin < lanes.first[to];
  multiply_keys(lanes.keys, lanes.queries + at * padded * kQueryParts, padded / kDepth, begin / kRows, end / kRows, lanes.logits);
  const float* scales = lanes.grids.key_scales;
  if (masked || step.key_remainders || problem.spec.softcap > 0.0f) {
    complete_logits(problem, lanes, step.key_remainders, at, step.key, begin, end);
    scales = lanes.ones;
  }
  const Vec before = load(lanes.m + at), m = largest_logits(lanes, scales, begin, end, before), keep = exp2_of(sub(before, m));
  const Vec sum = make_weights(lanes, scales, begin, end, m);
  store(lanes.m + at, m);
  store(lanes.l + at, fma(load(lanes.l + at), keep, sum));
  // The other half of a chunk of which only one is seen.
  const std::int64_t first = begin / kDepth * kDepth, last = round_up(end, kDepth);
  for (std::int64_t part = 0; part < kWeightParts; ++part) {
    if (first < begin) memset(lanes.weights + (first / kDepth * kWeightParts + part) * kTile, 0, kTile);
    if (end < last) memset(lanes.weights + (end / kDepth * kWeightParts + part) * kTile + kTile / 2, 0, kTile);
  }
  float* o = lanes.o + at * padded;
  if (step.value_remainders) {
    rescale(o, channels, keep, value_offset(lanes, begin, end));
  } else if (any_less(keep, set1(1.0f))) {
    rescale(o, channels, keep, set1(0.0f));
  }
  multiply_values(lanes.values, lanes.weights, channels / kRows, first / kDepth, last / kDepth, o);
}

BDQ_VECTOR void write_partial(const Block& block, const Lanes& lanes, std::int64_t D, const Partial& partial) {
  const std::int64_t padded = round_up(D, kDepth);
  for (std::int64_t n = 0; n < block.count; n += kRows) {
    const std::int64_t count = lesser(kRows, block.count - n);
    for (std::int64_t d = 0; d < D; d += kRows) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(lanes.o + n * padded + (d + i) * kRows);
      transpose16(r);
      const __mmask16 inside = D - d >= kRows ? 0xffff : 0xff;  // D is a multiple of eight
      for (std::int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi32(partial.o + (n + i) * D + d, inside, r[i]);
    }
  }
  memcpy(partial.m, lanes.m, static_cast<std::size_t>(block.count) * sizeof(float));
  memcpy(partial.l, lanes.l, static_cast<std::size_t>(block.count) * sizeof(float));
}

BDQ_TILES void attend(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  if (block.count <= kFewLanes) return attend_few(problem, block, partial, scratch);
  const AttentionSpec& spec = problem.spec;
  const std::int64_t D = spec.head_size;
  Carver carver(scratch);
  const Lanes lanes(carver, D, block.count);
  prepare_lanes(problem, block, lanes);
  const Tiles tiles;
  for (std::int64_t key = block.key_begin / kKeys * kKeys; key < block.key_end; key += kKeys) {
    const std::int64_t count = lesser(kKeys, block.key_end - key);
    RowGrids keys{lanes.grids.key_scales, lanes.grids.key_zeros, false}, values{lanes.grids.value_scales, lanes.grids.value_zeros, false};
    unpack_keys(problem.present_key(block.batch, block.kv_head, key), problem.key_row, D, spec.key_bits, count, lanes.keys, keys,
                lanes.codes);
    unpack_values(problem.present_value(block.batch, block.kv_head, key), problem.value_row, D, spec.value_bits, count, lanes.values,
                  values, lanes.words, lanes.codes);
    const Step step{key, count, keys.any_remainder, values.any_remainder};
    for (std::int64_t group = 0; group * kRows < block.count; ++group) attend_group(problem, block, lanes, group, step);
  }
  write_partial(block, lanes, D, partial);
}

void rotate(const float* x, const float* cos, const float* sin, float* y, std::int64_t half) {
  avx512::kernels.rotate(x, cos, sin, y, half);
}

// Queries and sums take ten bytes a channel: what half of a megabyte holds.
std::int64_t block_lanes(const Problem& problem) {
  const std::int64_t lanes = (std::int64_t{1} << 19) / (10 * round_up(problem.spec.head_size, kDepth));
  return greater(kRows, lesser(lanes, 384) / kRows * kRows);
}

std::size_t scratch_bytes(const Problem& problem, std::int64_t lanes) {
  Carver carver(nullptr);
  Lanes(carver, problem.spec.head_size, lanes);
  const std::size_t few = few_scratch_bytes(problem, lesser(lanes, kFewLanes));
  return few > carver.used() ? few : carver.used();
}

}  // namespace

bool supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1u) != 0;
}

const Kernels kernels = {rotate, block_lanes, scratch_bytes, attend};

}  // namespace bdq::attention::amx

#endif
