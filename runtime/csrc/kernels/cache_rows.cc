#include "cache_rows.h"

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace bdq {
namespace cache_rows {
namespace {

constexpr float kMinScale = 0x1p-32f;

// Calls visit(shift, width, first byte) for each plane of a row: 3 bits are a plane of the low 2 bits, then one of the high bit.
template <class Visit>
void for_each_plane(std::int64_t D, int bits, Visit visit) {
  if (bits == 3) {
    visit(0, 2, std::int64_t{0});
    visit(2, 1, D * 2 / 8);
  } else {
    visit(0, bits, std::int64_t{0});
  }
}

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
  // In range for every finite row below 2^46; beyond it, and for NaN, only the limits keep the conversion defined.
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
  std::memset(row, 0, static_cast<std::size_t>(D * bits / 8));
  for (std::int64_t channel = 0; channel < D; ++channel) {
    const float level = std::nearbyint(x[channel] * grid.inverse) + grid.zero_point;
    const int code = static_cast<int>(level > 0.0f ? std::min(level, top) : 0.0f);
    for_each_plane(D, bits, [&](int shift, int width, std::int64_t first) {
      const std::int64_t bytes = D * width / 8;
      const int field = code >> shift & ((1 << width) - 1);
      row[first + channel % bytes] |= static_cast<std::uint8_t>(field << (channel / bytes * width));
    });
  }
  store_grid(grid, row + D * bits / 8);
}

void dequantize_scalar(const std::uint8_t* row, float* x, std::int64_t D, int bits) {
  const std::uint8_t* tail = row + D * bits / 8;
  const float scale = scale_of(tail);
  const int zero = zero_point_of(tail);
  for (std::int64_t channel = 0; channel < D; ++channel) {
    int code = 0;
    for_each_plane(D, bits, [&](int shift, int width, std::int64_t first) {
      const std::int64_t bytes = D * width / 8;
      code |= (row[first + channel % bytes] >> (channel / bytes * width) & ((1 << width) - 1)) << shift;
    });
    x[channel] = static_cast<float>(code - zero) * scale;
  }
}

}  // namespace cache_rows

void quantize_cache_row(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip, Isa) {
  cache_rows::quantize_scalar(x, row, D, bits, clip);
}

void dequantize_cache_row(const std::uint8_t* row, float* x, std::int64_t D, int bits, Isa) {
  cache_rows::dequantize_scalar(row, x, D, bits);
}

}  // namespace bdq
