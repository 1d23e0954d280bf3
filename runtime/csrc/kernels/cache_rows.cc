#include "cache_rows.h"

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace bdq {
namespace cache_rows {
namespace {

constexpr float kMinScale = 0x1p-32f;

}  // namespace

Grid make_grid(float hi, float lo, int bits) {
  const float levels = 1.0f / static_cast<float>((1 << bits) - 1);
  const float largest = std::max(std::fabs(hi), std::fabs(lo));
  const float step = std::max(std::max((hi - lo) * levels, largest * 0x1p-14f), kMinScale);
  // step = 2^(e - 32) * (1 + fraction): its own exponent and its mantissa rounded, half to even, to 10 bits; a carry is the next power.
  std::uint32_t word;
  std::memcpy(&word, &step, sizeof word);
  word += 0xfffu + (word >> 13 & 1u);
  Grid grid;
  grid.scale_code = static_cast<std::uint16_t>(std::min((word >> 13) - (95u << 10), 65535u));
  word = (std::uint32_t{grid.scale_code} << 13) + (95u << 23);
  std::memcpy(&grid.scale, &word, sizeof word);
  grid.inverse = 1.0f / grid.scale;
  // In range for every row below 2^46; beyond it, and for NaN, only the limits keep the conversion defined.
  const float zero = std::nearbyint(-lo * grid.inverse);
  grid.zero_point = zero > -32768.0f ? std::min(zero, 32767.0f) : -32768.0f;
  return grid;
}

void quantize_scalar(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip) {
  float hi = x[0], lo = x[0];
  for (std::int64_t i = 1; i < D; ++i) {
    hi = std::max(hi, x[i]);
    lo = std::min(lo, x[i]);
  }
  const Grid grid = make_grid(hi * clip, lo * clip, bits);
  const float top = static_cast<float>((1 << bits) - 1);
  std::uint8_t codes[kMaxHeadSize];
  for (std::int64_t channel = 0; channel < D; ++channel) {
    const float level = std::nearbyint(x[channel] * grid.inverse) + grid.zero_point;
    codes[channel] = static_cast<std::uint8_t>(level > 0.0f ? std::min(level, top) : 0.0f);
  }
  pack_planes(codes, row, D, bits);
  store_grid(grid, row + D * bits / 8);
}

void dequantize_scalar(const std::uint8_t* row, float* x, std::int64_t D, int bits) {
  const std::uint8_t* tail = row + D * bits / 8;
  const float scale = scale_of(tail);
  const int zero = zero_point_of(tail);
  std::uint8_t codes[kMaxHeadSize];
  unpack_planes(row, codes, D, bits);
  for (std::int64_t channel = 0; channel < D; ++channel) x[channel] = static_cast<float>(codes[channel] - zero) * scale;
}

}  // namespace cache_rows

void quantize_cache_row(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip, Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kScalar) return cache_rows::quantize_avx2(x, row, D, bits, clip);
#elif defined(__aarch64__)
  if (isa != Isa::kScalar) return cache_rows::quantize_neon(x, row, D, bits, clip);
#else
  (void)isa;
#endif
  cache_rows::quantize_scalar(x, row, D, bits, clip);
}

void dequantize_cache_row(const std::uint8_t* row, float* x, std::int64_t D, int bits, Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kScalar) return cache_rows::dequantize_avx2(row, x, D, bits);
#elif defined(__aarch64__)
  if (isa != Isa::kScalar) return cache_rows::dequantize_neon(row, x, D, bits);
#else
  (void)isa;
#endif
  cache_rows::dequantize_scalar(row, x, D, bits);
}

}  // namespace bdq
