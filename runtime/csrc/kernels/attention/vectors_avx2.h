// The few operations that attention is written in, for AVX2 with FMA. vectors_avx512.h has the same names.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define BDQ_VECTOR __attribute__((target("avx2,fma")))
#define BDQ_INLINE static inline __attribute__((target("avx2,fma"), always_inline))

namespace bdq::attention::avx2 {

constexpr int kWidth = 8;     // floats of a Vec
constexpr int kTileRows = 4;  // of the matrix product, with two Vec of columns
constexpr int kFewTile = 3;   // lanes that share a conversion of codes, with four keys in flight

using Vec = __m256;
using Ints = __m256i;

BDQ_INLINE Vec load(const float* x) { return _mm256_loadu_ps(x); }
BDQ_INLINE void store(float* x, Vec v) { _mm256_storeu_ps(x, v); }
BDQ_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
BDQ_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
BDQ_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
BDQ_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
BDQ_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
BDQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
BDQ_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
BDQ_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
BDQ_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
BDQ_INLINE Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
BDQ_INLINE Vec with_sign_of(Vec magnitude, Vec sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign)); }
BDQ_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
BDQ_INLINE bool any_less(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }

// 2^x for x <= 0 (up to 2^127 in fact), to 3e-7; 2^-126 below -126. NaN stays NaN.
BDQ_INLINE Vec exp2_of(Vec x) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vec clamped = max(set1(-126.0f), x);
  const Vec shifted = add(clamped, magic);
  const Vec f = sub(clamped, sub(shifted, magic));
  Vec y = set1(0.00132764725f);
  y = fma(y, f, set1(0.00967554189f));
  y = fma(y, f, set1(0.0555071309f));
  y = fma(y, f, set1(0.240221202f));
  y = fma(y, f, set1(0.693146944f));
  y = fma(y, f, set1(1.00000012f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

BDQ_INLINE Ints load_ints(const std::int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// x where first <= key <= last, else -inf.
BDQ_INLINE Vec visible(Vec x, std::int32_t key, Ints first, Ints last) {
  const Ints at = _mm256_set1_epi32(key);
  const Ints hidden = _mm256_or_si256(_mm256_cmpgt_epi32(first, at), _mm256_cmpgt_epi32(at, last));
  return _mm256_blendv_ps(x, _mm256_set1_ps(-__builtin_inff()), _mm256_castsi256_ps(hidden));
}

// kWidth bytes as floats.
BDQ_INLINE Vec load_codes(const std::uint8_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

// The sums of four vectors.
BDQ_INLINE __m128 sums4(Vec a, Vec b, Vec c, Vec d) {
  const Vec s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

BDQ_INLINE void store_sums4(float* to, Vec a, Vec b, Vec c, Vec d) { _mm_storeu_ps(to, sums4(a, b, c, d)); }

BDQ_INLINE float sum(Vec a) { return _mm_cvtss_f32(sums4(a, a, a, a)); }

BDQ_INLINE float largest(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace bdq::attention::avx2
