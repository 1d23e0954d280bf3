// Rows of the cache with NEON: the operations of the scalar code, eight channels at a time (no fused multiply-add).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cache_rows.h"

namespace bdq::cache_rows {

void unpack_neon(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits) {
  if (bits != 4) return unpack_planes(row, codes, D, bits);
  const std::int64_t half = D / 2;
  std::int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const uint8x16_t pair = vld1q_u8(row + i);
    vst1q_u8(codes + i, vandq_u8(pair, vdupq_n_u8(15)));
    vst1q_u8(codes + half + i, vshrq_n_u8(pair, 4));
  }
  for (; i < half; ++i) {
    codes[i] = row[i] & 15;
    codes[half + i] = row[i] >> 4;
  }
}

void quantize_neon(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip) {
  float32x4_t hi = vld1q_f32(x), lo = hi;
  for (std::int64_t i = 4; i < D; i += 4) {
    const float32x4_t v = vld1q_f32(x + i);
    hi = vmaxq_f32(hi, v);
    lo = vminq_f32(lo, v);
  }
  const Grid grid = make_grid(vmaxvq_f32(hi) * clip, vminvq_f32(lo) * clip, bits);
  const float32x4_t inverse = vdupq_n_f32(grid.inverse), zero = vdupq_n_f32(grid.zero_point), none = vdupq_n_f32(0.0f);
  const float32x4_t top = vdupq_n_f32(static_cast<float>((1 << bits) - 1));
  std::uint8_t codes[kMaxHeadSize];
  for (std::int64_t i = 0; i < D; i += 8) {
    uint16x4_t halves[2];
    for (int part = 0; part < 2; ++part) {
      const float32x4_t level = vaddq_f32(vrndnq_f32(vmulq_f32(vld1q_f32(x + i + 4 * part), inverse)), zero);
      halves[part] = vmovn_u32(vcvtq_u32_f32(vminq_f32(vmaxq_f32(level, none), top)));
    }
    vst1_u8(codes + i, vmovn_u16(vcombine_u16(halves[0], halves[1])));
  }
  pack_planes(codes, row, D, bits);
  store_grid(grid, row + D * bits / 8);
}

void dequantize_neon(const std::uint8_t* row, float* x, std::int64_t D, int bits) {
  const std::uint8_t* tail = row + D * bits / 8;
  const float32x4_t scale = vdupq_n_f32(scale_of(tail));
  const int32x4_t zero = vdupq_n_s32(zero_point_of(tail));
  std::uint8_t codes[kMaxHeadSize];
  unpack_neon(row, codes, D, bits);
  for (std::int64_t i = 0; i < D; i += 8) {
    const uint16x8_t code = vmovl_u8(vld1_u8(codes + i));
    const int32x4_t low = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(code)));
    const int32x4_t high = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(code)));
    vst1q_f32(x + i, vmulq_f32(vcvtq_f32_s32(vsubq_s32(low, zero)), scale));
    vst1q_f32(x + i + 4, vmulq_f32(vcvtq_f32_s32(vsubq_s32(high, zero)), scale));
  }
}

}  // namespace bdq::cache_rows

#endif
