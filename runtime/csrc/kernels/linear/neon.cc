// NEON with the 8-bit dot product (sdot, Armv8.2): four columns of a channel are the four bytes of a 32-bit lane.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>

#include "half.h"
#include "kernels.h"

#define BDQ_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

namespace bdq {
namespace {

constexpr std::int64_t kRows = 4;               // rows that share what is loaded of a weight
constexpr std::int64_t kPart = 32;              // columns after which a block of scales may end
constexpr std::int64_t kCodes = kLanes * kChunk;  // bytes of a decoded chunk: columns 4 g .. 4 g + 3 of all lanes at 64 g

// Codes of a plane of `width` bits, shifted by `shift`; `first` overwrites what is there.
template <int width, int shift, bool first>
void decode_plane(const std::uint8_t* plane, std::uint8_t* codes) {
  constexpr int fields = 8 / width, vectors = 16 / fields;
  const uint8x16_t mask = vdupq_n_u8((1 << width) - 1);
  for (int v = 0; v < vectors; ++v) {
    for (int q = 0; q < 4; ++q) {
      uint8x16_t bytes = vld1q_u8(plane + 64 * v + 16 * q);
      for (int t = 0; t < fields; ++t) {
        uint8x16_t field = width == 8 ? bytes : vandq_u8(bytes, mask);
        if constexpr (shift > 0) field = vshlq_n_u8(field, shift);
        std::uint8_t* at = codes + 64 * (v * fields + t) + 16 * q;
        vst1q_u8(at, first ? field : vorrq_u8(vld1q_u8(at), field));
        if constexpr (width < 8) bytes = vshrq_n_u8(bytes, width);
      }
    }
  }
}

// A chunk as signed bytes: the code itself, of 8 bits the integer that it stands for.
void decode_chunk(const std::uint8_t* chunk, int bits, std::int8_t* signed_codes) {
  auto* codes = reinterpret_cast<std::uint8_t*>(signed_codes);
  switch (bits) {
    case 2: decode_plane<2, 0, true>(chunk, codes); break;
    case 3:
      decode_plane<2, 0, true>(chunk, codes);
      decode_plane<1, 2, false>(chunk + 256, codes);
      break;
    case 4: decode_plane<4, 0, true>(chunk, codes); break;
    default:
      decode_plane<8, 0, true>(chunk, codes);
      for (std::int64_t i = 0; i < kCodes; i += 16) vst1q_u8(codes + i, veorq_u8(vld1q_u8(codes + i), vdupq_n_u8(0x80)));
  }
}

// Decoded chunks of one panel: all of them lie in `memory`, or each is decoded when it is asked for.
struct Panel {
  const std::uint8_t* packed;
  int bits;
  std::int8_t* memory;
  bool decoded;

  const std::int8_t* chunk(std::int64_t c) const {
    if (decoded) return memory + c * kCodes;
    decode_chunk(packed + c * 2 * kChunk * bits, bits, memory);
    return memory;
  }
};

void store(float32x4_t value, float* to, int q) { vst1q_f32(to + 4 * q, value); }

void load_scales(const std::uint16_t* halves, float32x4_t (&scales)[4]) {
  float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = half_to_float(halves[lane]);
  for (int q = 0; q < 4; ++q) scales[q] = vld1q_f32(values + 4 * q);
}

// y [count, 16] of `count` rows from `row` on and one panel.
template <int count>
BDQ_DOT void integers(const Multiplication& m, std::int64_t row, std::int64_t panel, const Panel& weight, float* y) {
  const std::int64_t block = m.spec.block_size == 0 ? m.padded_K() : m.spec.block_size;
  const int step = m.spec.odd_grid ? 2 : 1;
  int32x4_t acc[count][4];
  float32x4_t sums[count][4];
  for (int r = 0; r < count; ++r)
    for (int q = 0; q < 4; ++q) {
      acc[r][q] = vdupq_n_s32(0);
      sums[r][q] = vdupq_n_f32(0.0f);
    }
  for (std::int64_t c = 0; c < m.sizes.chunks; ++c) {
    const std::int8_t* codes = weight.chunk(c);
    for (std::int64_t part = 0; part < kChunk; part += kPart) {
      for (std::int64_t k = part; k < part + kPart; k += 4) {
        int8x16_t w[4];
        for (int q = 0; q < 4; ++q) w[q] = vld1q_s8(codes + 16 * k + 16 * q);
        for (int r = 0; r < count; ++r) {
          std::int32_t four;
          __builtin_memcpy(&four, m.codes(row + r) + c * m.a.row_tile * kChunk + k, 4);
          const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
          for (int q = 0; q < 4; ++q) acc[r][q] = vdotq_s32(acc[r][q], w[q], a);
        }
      }
      const std::int64_t end = c * kChunk + part + kPart, b = (end - 1) / block;
      if (end % block != 0 && end != m.padded_K()) continue;
      if (b >= m.sizes.blocks) continue;  // columns that are padding
      float32x4_t scales[4];
      load_scales(m.scales + (panel * m.sizes.blocks + b) * kLanes, scales);
      for (int r = 0; r < count; ++r) {
        const std::int32_t offset = m.spec.weight_bits == 8 ? 0 : m.a.offsets[(row + r) * m.sum_count + b];
        for (int q = 0; q < 4; ++q) {
          const float32x4_t sum = vcvtq_f32_s32(vaddq_s32(vmulq_n_s32(acc[r][q], step), vdupq_n_s32(offset)));
          sums[r][q] = m.spec.block_size == 0 ? vmulq_f32(vmulq_n_f32(sum, m.a.scales[row + r]), scales[q])
                                              : vaddq_f32(sums[r][q], vmulq_f32(sum, scales[q]));
          acc[r][q] = vdupq_n_s32(0);
        }
      }
    }
  }
  for (int r = 0; r < count; ++r)
    for (int q = 0; q < 4; ++q)
      store(m.spec.block_size == 0 ? sums[r][q] : vmulq_n_f32(sums[r][q], m.a.scales[row + r]), y + r * kLanes, q);
}

// The four columns of 16 lanes, each as 16 floats.
void widen(const std::int8_t* codes, int step, int zero, float32x4_t (&w)[4][4]) {
  const int8x16x4_t columns = vld4q_s8(codes);
  for (int j = 0; j < 4; ++j) {
    const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(columns.val[j])), vmovl_s8(vget_high_s8(columns.val[j]))};
    for (int h = 0; h < 2; ++h) {
      const int16x8_t values = vsubq_s16(vmulq_n_s16(halves[h], static_cast<std::int16_t>(step)), vdupq_n_s16(static_cast<std::int16_t>(zero)));
      w[j][2 * h] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(values)));
      w[j][2 * h + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(values)));
    }
  }
}

template <int count>
void reals(const Multiplication& m, std::int64_t row, std::int64_t panel, const Panel& weight, float* y) {
  const std::int64_t block = m.spec.block_size == 0 ? m.padded_K() : m.spec.block_size;
  const int step = m.spec.odd_grid ? 2 : 1, zero = m.spec.weight_bits == 8 ? 0 : m.zero_point();
  float32x4_t acc[count][4], sums[count][4];
  for (int r = 0; r < count; ++r)
    for (int q = 0; q < 4; ++q) acc[r][q] = sums[r][q] = vdupq_n_f32(0.0f);
  for (std::int64_t c = 0; c < m.sizes.chunks; ++c) {
    const std::int8_t* codes = weight.chunk(c);
    for (std::int64_t part = 0; part < kChunk; part += kPart) {
      for (std::int64_t k = part; k < part + kPart; k += 4) {
        float32x4_t w[4][4];
        widen(codes + 16 * k, step, zero, w);
        for (int r = 0; r < count; ++r) {
          const float* x = m.a.floats + (row + r) * m.a.float_stride + c * kChunk + k;
          for (int j = 0; j < 4; ++j)
            for (int q = 0; q < 4; ++q) acc[r][q] = vfmaq_n_f32(acc[r][q], w[j][q], x[j]);
        }
      }
      const std::int64_t end = c * kChunk + part + kPart, b = (end - 1) / block;
      if ((end % block != 0 && end != m.padded_K()) || b >= m.sizes.blocks) continue;
      float32x4_t scales[4];
      load_scales(m.scales + (panel * m.sizes.blocks + b) * kLanes, scales);
      for (int r = 0; r < count; ++r)
        for (int q = 0; q < 4; ++q) {
          sums[r][q] = vfmaq_f32(sums[r][q], acc[r][q], scales[q]);
          acc[r][q] = vdupq_n_f32(0.0f);
        }
    }
  }
  for (int r = 0; r < count; ++r)
    for (int q = 0; q < 4; ++q) store(sums[r][q], y + r * kLanes, q);
}

using Tile = void (*)(const Multiplication&, std::int64_t, std::int64_t, const Panel&, float*);
constexpr Tile kIntegers[kRows] = {integers<1>, integers<2>, integers<3>, integers<4>};
constexpr Tile kReals[kRows] = {reals<1>, reals<2>, reals<3>, reals<4>};

float gated(Gate gate, float g, float u) {
  if (gate == Gate::kSilu) return g / (1.0f + std::exp(-g)) * u;
  // g / (1 + exp(-2 z)) is 0.5 g (1 + tanh z) without its cancellation
  const float z = 0.7978845608f * (g + 0.044715f * g * g * g);
  return g / (1.0f + std::exp(-2.0f * z)) * u;
}

// results [panels][kRows][16] of one group, to y.
void finish(const Multiplication& m, std::int64_t group, std::int64_t panels, std::int64_t row, std::int64_t count,
            const float (&results)[2][kRows * kLanes]) {
  const bool gate = m.spec.gate != Gate::kNone;
  const std::int64_t width = gate ? kLanes : panels * kLanes, first = group * (gate ? kLanes : 2 * kLanes);
  const std::int64_t outputs = std::min(width, m.spec.N - first);
  const auto biased = [&](std::int64_t panel, std::int64_t r, std::int64_t lane, std::int64_t channel) {
    const float y = results[panel][r * kLanes + lane];
    return m.bias == nullptr ? y : y + m.bias[channel];
  };
  for (std::int64_t r = 0; r < count; ++r) {
    float* y = m.y + (row + r) * m.spec.N + first;
    for (std::int64_t n = 0; n < outputs; ++n) {
      y[n] = gate ? gated(m.spec.gate, biased(0, r, n, first + n), biased(1, r, n, m.spec.N + first + n))
                  : biased(n / kLanes, r, n % kLanes, first + n);
    }
  }
}

void multiply(const Multiplication& m, std::int64_t row_begin, std::int64_t row_end, std::int64_t group_begin,
              std::int64_t group_end, std::uint8_t* scratch) {
  const Tile* tiles = m.spec.activation_bits == 16 ? kReals : kIntegers;
  const bool decoded = row_end - row_begin > kRows;  // else a weight is read once: each chunk stays in the cache
  for (std::int64_t group = group_begin; group < group_end; ++group) {
    const std::int64_t panels = std::min<std::int64_t>(2, m.sizes.panels - 2 * group);
    Panel weights[2];
    for (std::int64_t p = 0; p < panels; ++p) {
      std::int8_t* memory = reinterpret_cast<std::int8_t*>(scratch) + (decoded ? p * kLanes * m.padded_K() : 0);
      weights[p] = {m.weight + (2 * group + p) * m.panel_bytes(), m.spec.weight_bits, memory, decoded};
      for (std::int64_t c = 0; decoded && c < m.sizes.chunks; ++c)
        decode_chunk(weights[p].packed + c * 2 * kChunk * m.spec.weight_bits, m.spec.weight_bits, memory + c * kCodes);
    }
    for (std::int64_t row = row_begin; row < row_end; row += kRows) {
      const std::int64_t count = std::min(kRows, row_end - row);
      float results[2][kRows * kLanes];
      for (std::int64_t p = 0; p < panels; ++p) tiles[count - 1](m, row, 2 * group + p, weights[p], results[p]);
      finish(m, group, panels, row, count, results);
    }
  }
}

std::size_t scratch_bytes(const Multiplication& m, std::int64_t rows) {
  return static_cast<std::size_t>(rows > kRows ? 2 * kLanes * m.padded_K() : kCodes);
}

}  // namespace

const LinearKernels& neon_dot_linear_kernels() {
  // Rows are the plain code: NEON is the baseline, so the compiler uses it there.
  static const LinearKernels table{scalar_linear_kernels().hadamard, scalar_linear_kernels().quantize, multiply, scratch_bytes};
  return table;
}

}  // namespace bdq
#endif
