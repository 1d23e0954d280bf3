// Attention in plain C++: the reference of the others, and the code of processors that have no kernel of their own. Sums are double.
#include <cmath>
#include <limits>

#include "../rows.h"
#include "kernels.h"

namespace bdq::attention {
namespace {

constexpr std::int64_t kLanes = 32, kKeys = 64;
constexpr float kLog2e = 1.44269504088896340736f;

void rotate(const float* x, const float* cos, const float* sin, float* y, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

std::int64_t block_lanes(const Problem&) { return kLanes; }

// Queries, a block of dequantized keys and of values, and one row of double sums.
std::size_t scratch_bytes(const Problem& problem, std::int64_t lanes) {
  return static_cast<std::size_t>(problem.spec.head_size * (lanes + 2 * kKeys + 2)) * sizeof(float);
}

double dot(const float* a, const float* b, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// One lane against `count` keys, the first of which is number `first` in its block.
struct Lane {
  const float* query;
  float *o, *m, *l;
};

void attend_lane(const Problem& problem, const Lane& lane, const float* keys, const float* values, std::int64_t count, double* sums) {
  const std::int64_t D = problem.spec.head_size;
  const double softcap = problem.spec.softcap;
  double z[kKeys];
  double top = *lane.m;
  for (std::int64_t j = 0; j < count; ++j) {
    double logit = dot(lane.query, keys + j * D, D) * problem.spec.scale;
    if (softcap > 0.0) logit = softcap * std::tanh(logit / softcap);
    z[j] = logit * static_cast<double>(kLog2e);
    top = std::fmax(top, z[j]);
  }
  const float m = static_cast<float>(top);
  const double keep = std::exp2(static_cast<double>(*lane.m) - static_cast<double>(m));
  double l = *lane.l * keep;
  for (std::int64_t d = 0; d < D; ++d) sums[d] = lane.o[d] * keep;
  for (std::int64_t j = 0; j < count; ++j) {
    const double p = std::exp2(z[j] - static_cast<double>(m));
    l += p;
    for (std::int64_t d = 0; d < D; ++d) sums[d] += p * static_cast<double>(values[j * D + d]);
  }
  for (std::int64_t d = 0; d < D; ++d) lane.o[d] = static_cast<float>(sums[d]);
  *lane.m = m;
  *lane.l = static_cast<float>(l);
}

void attend(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  const AttentionSpec& spec = problem.spec;
  const std::int64_t D = spec.head_size, past = problem.past(block.batch);
  double* sums = reinterpret_cast<double*>(scratch);
  float* queries = reinterpret_cast<float*>(sums + D);
  float* keys = queries + block.count * D;
  float* values = keys + kKeys * D;
  for (std::int64_t n = 0; n < block.count; ++n) {
    const std::int64_t lane = block.first + n;
    prepare_head(problem, kScalarKernels, problem.query(block.batch, block.kv_head, lane), past + lane / problem.group, queries + n * D);
    partial.m[n] = -std::numeric_limits<float>::infinity();
    partial.l[n] = 0.0f;
    for (std::int64_t d = 0; d < D; ++d) partial.o[n * D + d] = 0.0f;
  }
  for (std::int64_t first = block.key_begin; first < block.key_end; first += kKeys) {
    const std::int64_t last = std::min(first + kKeys, block.key_end);
    for (std::int64_t j = first; j < last; ++j) {
      dequantize_cache_row(problem.present_key(block.batch, block.kv_head, j), keys + (j - first) * D, D, spec.key_bits, problem.isa);
      dequantize_cache_row(problem.present_value(block.batch, block.kv_head, j), values + (j - first) * D, D, spec.value_bits, problem.isa);
    }
    for (std::int64_t n = 0; n < block.count; ++n) {
      const std::int64_t position = past + (block.first + n) / problem.group;
      const std::int64_t begin = std::max(first, problem.first_key(position)), end = std::min(last, position + 1);
      if (begin >= end) continue;
      const Lane lane{queries + n * D, partial.o + n * D, partial.m + n, partial.l + n};
      attend_lane(problem, lane, keys + (begin - first) * D, values + (begin - first) * D, end - begin, sums);
    }
  }
}

}  // namespace

const Kernels kScalarKernels = {rotate, block_lanes, scratch_bytes, attend};

}  // namespace bdq::attention
