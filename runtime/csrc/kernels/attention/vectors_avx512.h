// The few operations that attention is written in, for AVX-512 (F, DQ, BW, VL). vectors_avx2.h has the same names.
#pragma once

// GCC's header initialises vectors from themselves where their value does not matter, and then warns of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#define BDQ_VECTOR __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,fma")))
#define BDQ_INLINE static inline __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,fma"), always_inline))

namespace bdq::attention::avx512 {

constexpr int kWidth = 16;    // floats of a Vec
constexpr int kTileRows = 8;  // of the matrix product, with two Vec of columns
constexpr int kFewTile = 4;   // lanes that share a conversion of codes, with four keys in flight

using Vec = __m512;
using Ints = __m512i;

BDQ_INLINE Vec load(const float* x) { return _mm512_loadu_ps(x); }
BDQ_INLINE void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }
BDQ_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
BDQ_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
BDQ_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
BDQ_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
BDQ_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
BDQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
BDQ_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
BDQ_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
BDQ_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
BDQ_INLINE Vec absolute(Vec a) { return _mm512_abs_ps(a); }
BDQ_INLINE Vec with_sign_of(Vec magnitude, Vec sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign)); }
BDQ_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
BDQ_INLINE bool any_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }

// 2^x, to 3e-7. NaN stays NaN.
BDQ_INLINE Vec exp2_of(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  Vec y = set1(0.00187757669f);
  y = fma(y, f, set1(0.00898934063f));
  y = fma(y, f, set1(0.0558263175f));
  y = fma(y, f, set1(0.240153611f));
  y = fma(y, f, set1(0.693153083f));
  y = fma(y, f, set1(0.99999994f));
  return _mm512_scalef_ps(y, x);  // y * 2^floor(x)
}

BDQ_INLINE Ints load_ints(const std::int32_t* x) { return _mm512_loadu_si512(x); }

// x where first <= key <= last, else -inf.
BDQ_INLINE Vec visible(Vec x, std::int32_t key, Ints first, Ints last) {
  const Ints at = _mm512_set1_epi32(key);
  const __mmask16 seen = _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(first, at), at, last);
  return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), x);
}

// kWidth bytes as floats.
BDQ_INLINE Vec load_codes(const std::uint8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

BDQ_INLINE __m256 halves(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }

// The sums of four vectors.
BDQ_INLINE __m128 sums4(Vec a, Vec b, Vec c, Vec d) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

BDQ_INLINE void store_sums4(float* to, Vec a, Vec b, Vec c, Vec d) { _mm_storeu_ps(to, sums4(a, b, c, d)); }

BDQ_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a); }
BDQ_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a); }

}  // namespace bdq::attention::avx512
