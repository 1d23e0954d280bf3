// The reference: docs/ops.md in plain C++. Every other instruction set is tested against it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace bdq {
namespace {

// Largest |x|, or NaN where there is one: magnitudes order like the integers that hold their bits.
float largest_magnitude(const float* x, std::int64_t K) {
  std::uint32_t largest = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    std::uint32_t bits;
    std::memcpy(&bits, x + k, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  float value;
  std::memcpy(&value, &largest, 4);
  return value;
}

// A NaN stays one.
float at_least(float value, float floor) { return value < floor ? floor : value; }

void hadamard(const float* x, const float* diagonal, float* y, std::int64_t K, int size) {
  int log2 = 0;
  while ((1 << log2) < size) ++log2;
  const float grid = std::ldexp(1.0f, -std::min(24 - log2, 20));
  const float step = at_least(largest_magnitude(x, K) * grid, 1e-30f);
  const float inverse = 1.0f / step;
  const float back = step * static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (std::int64_t k = 0; k < K; ++k) y[k] = std::nearbyintf(x[k] * inverse) + 0.0f;  // no -0: its sign would depend on the order
  for (std::int64_t start = 0; start < K; start += size) {
    float* block = y + start;
    for (int half = 1; half < size; half *= 2) {
      for (int i = 0; i < size; i += 2 * half) {
        for (int j = i; j < i + half; ++j) {
          const float a = block[j], b = block[j + half];
          block[j] = a + b;
          block[j + half] = a - b;
        }
      }
    }
  }
  for (std::int64_t k = 0; k < K; ++k) y[k] *= back;
  if (diagonal != nullptr) {
    for (std::int64_t k = 0; k < K; ++k) y[k] *= diagonal[k];
  }
}

float quantize(const float* x, std::int64_t K, std::int64_t padded_K, int bits, float clip, const RowTarget& target) {
  const float low = static_cast<float>(-(1 << (bits - 1))), high = static_cast<float>((1 << (bits - 1)) - 1);
  const float scale = at_least(largest_magnitude(x, K) * (clip / high), 1e-30f);
  const float inverse = 1.0f / scale;
  std::fill_n(target.sums, target.sum_count, 0);
  for (std::int64_t k = 0; k < padded_K; ++k) {
    float q = 0.0f;
    if (k < K) {
      q = std::nearbyintf(x[k] * inverse);
      q = q > low ? q : low;  // a NaN becomes the lowest code
      q = q < high ? q : high;
    }
    const auto code = static_cast<std::int8_t>(q);
    target.codes[k / kChunk * target.chunk_stride + k % kChunk] = code;
    if (k < K) target.sums[k / target.sum_columns] += code;
  }
  return scale;
}

// Integers of one panel, [16, padded_K].
void decode_panel(const Multiplication& m, std::int64_t panel, std::int8_t* w) {
  const int bits = m.spec.weight_bits, zero = m.zero_point(), step = m.spec.odd_grid ? 2 : 1;
  const int planes[2] = {bits == 3 ? 2 : bits, bits == 3 ? 1 : 0};
  const std::uint8_t* chunk = m.weight + panel * m.panel_bytes();
  for (std::int64_t c = 0; c < m.sizes.chunks; ++c, chunk += 2 * kChunk * bits) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      for (std::int64_t k = 0; k < kChunk; ++k) {
        const std::uint8_t* plane = chunk;
        int code = 0, shift = 0;
        for (int width : planes) {
          if (width == 0) continue;
          const std::int64_t fields = 8 / width, vector = k / (4 * fields), field = k / 4 % fields;
          const int byte = plane[vector * 64 + 4 * lane + k % 4];
          code |= ((byte >> (width * field)) & ((1 << width) - 1)) << shift;
          shift += width;
          plane += kLanes * kChunk * width / 8;
        }
        w[lane * m.padded_K() + c * kChunk + k] = static_cast<std::int8_t>(step * code - zero);
      }
    }
  }
}

float gated(Gate gate, float g, float u) {
  if (gate == Gate::kSilu) return g / (1.0f + std::exp(-g)) * u;
  // g / (1 + exp(-2 z)) is 0.5 g (1 + tanh z) without its cancellation
  const float z = 0.7978845608f * (g + 0.044715f * g * g * g);
  return g / (1.0f + std::exp(-2.0f * z)) * u;
}

struct Row {
  const Multiplication& m;
  std::int64_t row;

  float integer(const std::int8_t* w, std::int64_t panel, std::int64_t lane) const {
    const std::int64_t block = m.spec.block_size == 0 ? m.padded_K() : m.spec.block_size;
    const std::int8_t* codes = m.codes(row);
    const float scale = m.a.scales[row];
    float sum = 0.0f;
    for (std::int64_t b = 0; b < m.sizes.blocks; ++b) {
      std::int32_t acc = 0;
      for (std::int64_t k = b * block; k < std::min((b + 1) * block, m.padded_K()); ++k) {
        acc += codes[k / kChunk * m.a.row_tile * kChunk + k % kChunk] * w[k];
      }
      const float weight_scale = half_to_float(m.scales[(panel * m.sizes.blocks + b) * kLanes + lane]);
      if (m.spec.block_size == 0) return (static_cast<float>(acc) * scale) * weight_scale;
      sum += static_cast<float>(acc) * weight_scale;
    }
    return scale * sum;
  }

  float real(const std::int8_t* w, std::int64_t panel, std::int64_t lane) const {
    const std::int64_t block = m.spec.block_size == 0 ? m.padded_K() : m.spec.block_size;
    const float* x = m.a.floats + row * m.a.float_stride;
    float sum = 0.0f;
    for (std::int64_t b = 0; b < m.sizes.blocks; ++b) {
      float part = 0.0f;
      for (std::int64_t k = b * block; k < std::min((b + 1) * block, m.spec.K); ++k) part += x[k] * static_cast<float>(w[k]);
      sum += part * half_to_float(m.scales[(panel * m.sizes.blocks + b) * kLanes + lane]);
    }
    return sum;
  }
};

void multiply(const Multiplication& m, std::int64_t row_begin, std::int64_t row_end, std::int64_t group_begin,
              std::int64_t group_end, std::uint8_t* scratch) {
  auto* w = reinterpret_cast<std::int8_t*>(scratch);
  const bool gate = m.spec.gate != Gate::kNone;
  for (std::int64_t group = group_begin; group < group_end; ++group) {
    const std::int64_t panels = std::min<std::int64_t>(2, m.sizes.panels - 2 * group);
    for (std::int64_t p = 0; p < panels; ++p) decode_panel(m, 2 * group + p, w + p * kLanes * m.padded_K());
    for (std::int64_t row = row_begin; row < row_end; ++row) {
      const Row one{m, row};
      float result[2][kLanes];
      for (std::int64_t p = 0; p < panels; ++p) {
        const std::int64_t first = gate ? group * kLanes : (2 * group + p) * kLanes;
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
          const std::int8_t* row_of_w = w + (p * kLanes + lane) * m.padded_K();
          const std::int64_t panel = 2 * group + p;
          const float y = m.spec.activation_bits == 16 ? one.real(row_of_w, panel, lane) : one.integer(row_of_w, panel, lane);
          const bool biased = m.bias != nullptr && first + lane < m.spec.N;
          result[p][lane] = biased ? y + m.bias[first + lane + (gate ? p * m.spec.N : 0)] : y;
        }
      }
      const std::int64_t outputs = gate ? kLanes : panels * kLanes, first = group * (gate ? kLanes : 2 * kLanes);
      for (std::int64_t n = 0; n < outputs && first + n < m.spec.N; ++n) {
        float& y = m.y[row * m.spec.N + first + n];
        y = gate ? gated(m.spec.gate, result[0][n], result[1][n]) : result[n / kLanes][n % kLanes];
      }
    }
  }
}

std::size_t scratch_bytes(const Multiplication& m, std::int64_t) {
  return static_cast<std::size_t>(2 * kLanes * m.padded_K());
}

}  // namespace

const LinearKernels& scalar_linear_kernels() {
  static const LinearKernels table{hadamard, quantize, multiply, scratch_bytes};
  return table;
}

}  // namespace bdq
