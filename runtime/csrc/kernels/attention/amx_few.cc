// The three bfloat16 parts of five lanes share one tile: as columns where it is multiplied with keys, as rows where weights are multiplied
// with values. So products are those of float32, and adding the parts up is all they cost.
#if defined(__x86_64__)

#include "amx_few.h"

#include <cstring>

#include "amx_parts.h"
#include "amx_rows.h"
#include "lanes.h"
#include "vector_tables.h"

namespace bdq::attention::amx {
namespace {

using namespace avx512;

#include "functions_inl.h"
#include "softmax_row_inl.h"

constexpr std::int64_t kParts = kQueryParts;
constexpr std::int64_t kTileLanes = kRows / kParts;
constexpr std::int64_t kStep = 2 * kKeys;  // the way of a key through tiles and softmax is long: more of them take it at a time

struct Few {
  Half* queries;        // [tiles of lanes, chunks, kTile]: column kParts * lane + part
  float* totals;        // [lanes]: Σ q
  float* o;             // [lanes, channels], in the order of channel_of
  float* row;           // [padded]
  float* weights;       // [lanes, kStep]
  StepGrids grids;      // zero points are what is left of them
  Half *keys, *values;  // as unpack_keys and unpack_value_pairs have them, kKeys after kKeys
  float* dots;          // [kKeys, 16]
  Half* parts;          // [kStep / kDepth, kTile]: weights, row kParts * lane + part
  float* sums;          // [channel tiles, 16, 16]
  Half* words;          // [kKeys, padded]
  std::uint8_t* codes;  // [padded]

  Few(Carver& carver, std::int64_t padded, std::int64_t lanes) {
    queries = carver.take<Half>(round_up(lanes, kTileLanes) / kTileLanes * padded * kRows);
    totals = carver.take<float>(lanes);
    o = carver.take<float>(lanes * padded);
    row = carver.take<float>(padded);
    weights = carver.take<float>(round_up(lanes, kTileLanes) * kStep);
    grids = take_grids(carver, kStep);
    keys = carver.take<Half>(kStep * padded);
    values = carver.take<Half>(kStep * padded);
    dots = carver.take<float>(kKeys * kRows);
    parts = carver.take<Half>(kStep * kRows);
    sums = carver.take<float>(padded * kRows);
    words = carver.take<Half>(kKeys * padded);
    codes = carver.take<std::uint8_t>(padded);
  }
};

BDQ_VECTOR void prepare_lanes(const Problem& problem, const Block& block, const Few& few, const Partial& partial) {
  const std::int64_t D = problem.spec.head_size, padded = round_up(D, kDepth), past = problem.past(block.batch);
  const float factor = Factors(problem.spec).query;
  for (std::int64_t n = 0; n < block.count; n += kTileLanes) {
    const std::int64_t count = lesser(kTileLanes, block.count - n);
    Half* queries = few.queries + n / kTileLanes * padded * kRows;
    memset(queries, 0, static_cast<std::size_t>(padded * kRows) * sizeof(Half));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = block.first + n + i;
      prepare_head(problem, avx512::kernels, problem.query(block.batch, block.kv_head, lane), past + lane / problem.group, few.row);
      for (std::int64_t d = D; d < padded; ++d) few.row[d] = 0.0f;
      few.totals[n + i] = scale_row(few.row, padded, factor);
      for (std::int64_t d = 0; d < padded; d += kDepth) {
        __m512i parts[kParts];
        split32(few.row + d, parts);
        for (std::int64_t part = 0; part < kParts; ++part)
          _mm512_storeu_si512(queries + d * kRows + (kParts * i + part) * kDepth, parts[part]);
      }
      partial.m[n + i] = kNothingSeen;
      partial.l[n + i] = 0.0f;
    }
    for (std::int64_t d = 0; d < padded; d += kDepth) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(queries + d * kRows + i * kDepth);
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(queries + d * kRows + i * kDepth, r[i]);
    }
  }
  memset(few.o, 0, static_cast<std::size_t>(block.count * padded) * sizeof(float));
  memset(few.codes, 0, static_cast<std::size_t>(padded));
}

// dots [16 * tiles, 16] to weights [count, kStep], parts added up.
BDQ_VECTOR void gather_dots(const float* dots, std::int64_t tiles, std::int64_t count, float* weights) {
  for (std::int64_t t = 0; t < tiles; ++t) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(dots + (t * kRows + i) * kRows);
    transpose16(r);
#pragma GCC unroll 5
    for (int i = 0; i < kTileLanes; ++i) {
      const Vec sum = add(_mm512_castsi512_ps(r[3 * i]), add(_mm512_castsi512_ps(r[3 * i + 1]), _mm512_castsi512_ps(r[3 * i + 2])));
      if (i < count) store(weights + i * kStep + t * kRows, sum);
    }
  }
}

BDQ_VECTOR void split_weights(const float* weights, std::int64_t count, Half* parts) {
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t c = 0; c < kStep / kDepth; ++c) {
      __m512i row[kParts];
      split32(weights + i * kStep + c * kDepth, row);
      for (std::int64_t part = 0; part < kParts; ++part) _mm512_storeu_si512(parts + c * kTile + (kParts * i + part) * kDepth, row[part]);
    }
  }
}

BDQ_VECTOR void attend_tile(const Problem& problem, const Block& block, const Few& few, std::int64_t n, std::int64_t key,
                            std::int64_t count, const Partial& partial) {
  const std::int64_t padded = round_up(problem.spec.head_size, kDepth), channel_tiles = padded / kRows, past = problem.past(block.batch);
  const std::int64_t lanes = lesser(kTileLanes, block.count - n);
  float* weights = few.weights + n * kStep;
  for (std::int64_t j = 0; j < count; j += kKeys) {
    const std::int64_t key_tiles = round_up(lesser(kKeys, count - j), kRows) / kRows;
    multiply_few_keys(few.keys + j * padded, few.queries + n / kTileLanes * padded * kRows, padded / kDepth, key_tiles, few.dots);
    gather_dots(few.dots, key_tiles, lanes, weights + j);
  }
  float keep[kTileLanes], offset[kTileLanes];
  for (std::int64_t i = 0; i < lanes; ++i) {
    for (std::int64_t j = round_up(count, kRows); j < kStep; ++j) weights[i * kStep + j] = 0.0f;
    const Seen seen(problem, past, block.first + n + i);
    softmax_row<kStep>(problem, few.grids, seen, key, count, few.totals[n + i], weights + i * kStep, partial, n + i, keep + i, offset + i);
  }
  split_weights(weights, lanes, few.parts);
  multiply_few_values(few.parts, few.values, channel_tiles, round_up(count, kDepth) / kDepth, few.sums);
  for (std::int64_t i = 0; i < lanes; ++i) {
    for (std::int64_t t = 0; t < channel_tiles; ++t) {
      const float* sums = few.sums + (t * kRows + kParts * i) * kRows;
      float* o = few.o + (n + i) * padded + t * kRows;
      const Vec sum = add(load(sums), add(load(sums + kRows), load(sums + 2 * kRows)));
      store(o, fma(load(o), set1(keep[i]), sub(sum, set1(offset[i]))));
    }
  }
}

}  // namespace

BDQ_TILES void attend_few(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  const AttentionSpec& spec = problem.spec;
  const std::int64_t D = spec.head_size, padded = round_up(D, kDepth);
  Carver carver(scratch);
  const Few few(carver, padded, block.count);
  prepare_lanes(problem, block, few, partial);
  memset(few.parts, 0, kStep * kRows * sizeof(Half));
  const Tiles tiles;
  for (std::int64_t key = block.key_begin / kKeys * kKeys; key < block.key_end; key += kStep) {
    const std::int64_t count = lesser(kStep, block.key_end - key);
    for (std::int64_t j = 0; j < kStep; j += kKeys) {
      const std::int64_t part = greater(0, lesser(kKeys, count - j)), at = part > 0 ? key + j : key;
      RowGrids keys{few.grids.key_scales + j, few.grids.key_zeros + j, false},
          values{few.grids.value_scales + j, few.grids.value_zeros + j, false};
      unpack_keys(problem.present_key(block.batch, block.kv_head, at), problem.key_row, D, spec.key_bits, part, few.keys + j * padded, keys,
                  few.codes);
      unpack_value_pairs(problem.present_value(block.batch, block.kv_head, at), problem.value_row, D, spec.value_bits, part,
                         few.values + j * padded, values, few.words, few.codes);
    }
    for (std::int64_t n = 0; n < block.count; n += kTileLanes) attend_tile(problem, block, few, n, key, count, partial);
  }
  for (std::int64_t n = 0; n < block.count; ++n) {
    for (std::int64_t i = 0; i < padded; ++i) {
      const std::int64_t channel = channel_of(i / kRows, i % kRows);
      if (channel < D) partial.o[n * D + channel] = few.o[n * padded + i];
    }
  }
}

std::size_t few_scratch_bytes(const Problem& problem, std::int64_t lanes) {
  Carver carver(nullptr);
  Few(carver, round_up(problem.spec.head_size, kDepth), lanes);
  return carver.used();
}

}  // namespace bdq::attention::amx

#endif
