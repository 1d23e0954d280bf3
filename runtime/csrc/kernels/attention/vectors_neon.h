// The few operations that attention is written in, for NEON (Armv8). vectors_avx2.h has the same names.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define BDQ_VECTOR
#define BDQ_INLINE static inline __attribute__((always_inline))

namespace bdq::attention::neon {

constexpr int kWidth = 4;     // floats of a Vec
constexpr int kTileRows = 8;  // of the matrix product, with two Vec of columns
constexpr int kFewTile = 4;   // lanes that share a conversion of codes, with four keys in flight

using Vec = float32x4_t;
using Ints = int32x4_t;

BDQ_INLINE Vec load(const float* x) { return vld1q_f32(x); }
BDQ_INLINE void store(float* x, Vec v) { vst1q_f32(x, v); }
BDQ_INLINE Vec set1(float x) { return vdupq_n_f32(x); }
BDQ_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
BDQ_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
BDQ_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
BDQ_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
BDQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
BDQ_INLINE Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c, a, b); }
BDQ_INLINE Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }  // NaN where either is
BDQ_INLINE Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
BDQ_INLINE Vec absolute(Vec a) { return vabsq_f32(a); }
BDQ_INLINE Vec with_sign_of(Vec magnitude, Vec sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
BDQ_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
BDQ_INLINE bool any_less(Vec a, Vec b) { return vmaxvq_u32(vcltq_f32(a, b)) != 0; }

// 2^x for x <= 0 (up to 2^127 in fact), to 3e-7; 2^-126 below -126. NaN stays NaN.
BDQ_INLINE Vec exp2_of(Vec x) {
  const Vec clamped = max(set1(-126.0f), x), whole = vrndnq_f32(clamped), f = sub(clamped, whole);
  Vec y = set1(0.00132764725f);
  y = fma(y, f, set1(0.00967554189f));
  y = fma(y, f, set1(0.0555071309f));
  y = fma(y, f, set1(0.240221202f));
  y = fma(y, f, set1(0.693146944f));
  y = fma(y, f, set1(1.00000012f));
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), vshlq_n_s32(vcvtq_s32_f32(whole), 23)));
}

BDQ_INLINE Ints load_ints(const std::int32_t* x) { return vld1q_s32(x); }

// x where first <= key <= last, else -inf.
BDQ_INLINE Vec visible(Vec x, std::int32_t key, Ints first, Ints last) {
  const Ints at = vdupq_n_s32(key);
  return vbslq_f32(vandq_u32(vcleq_s32(first, at), vcleq_s32(at, last)), x, set1(-__builtin_inff()));
}

// kWidth bytes as floats.
BDQ_INLINE Vec load_codes(const std::uint8_t* x) {
  std::uint32_t four;
  std::memcpy(&four, x, sizeof four);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}

// The sums of four vectors.
BDQ_INLINE void store_sums4(float* to, Vec a, Vec b, Vec c, Vec d) { vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

BDQ_INLINE float sum(Vec a) { return vaddvq_f32(a); }
BDQ_INLINE float largest(Vec a) { return vmaxvq_f32(a); }

}  // namespace bdq::attention::neon
