// Rows of the cache with AVX2: the operations of the scalar code, eight channels at a time (no fused multiply-add).
#if defined(__x86_64__)

#include <immintrin.h>

#include "cache_rows.h"

#define BDQ_AVX2 __attribute__((target("avx2")))

namespace bdq::cache_rows {
namespace {

BDQ_AVX2 float largest(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

BDQ_AVX2 float smallest(__m256 v) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace

BDQ_AVX2 void quantize_avx2(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip) {
  __m256 hi = _mm256_loadu_ps(x), lo = hi;
  for (std::int64_t i = 8; i < D; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    hi = _mm256_max_ps(hi, v);
    lo = _mm256_min_ps(lo, v);
  }
  const Grid grid = make_grid(largest(hi) * clip, smallest(lo) * clip, bits);
  const __m256 inverse = _mm256_set1_ps(grid.inverse), zero = _mm256_set1_ps(grid.zero_point);
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << bits) - 1));
  alignas(8) std::uint8_t codes[kMaxHeadSize];
  for (std::int64_t i = 0; i < D; i += 8) {
    const __m256 rounded = _mm256_round_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 level = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(rounded, zero), _mm256_setzero_ps()), top);
    const __m256i words = _mm256_cvtps_epi32(level);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packus_epi16(halves, halves));
  }
  pack_planes(codes, row, D, bits);
  store_grid(grid, row + D * bits / 8);
}

BDQ_AVX2 void dequantize_avx2(const std::uint8_t* row, float* x, std::int64_t D, int bits) {
  const std::uint8_t* tail = row + D * bits / 8;
  const __m256 scale = _mm256_set1_ps(scale_of(tail));
  const __m256i zero = _mm256_set1_epi32(zero_point_of(tail));
  alignas(8) std::uint8_t codes[kMaxHeadSize];
  unpack_planes(row, codes, D, bits);
  for (std::int64_t i = 0; i < D; i += 8) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale));
  }
}

}  // namespace bdq::cache_rows

#endif
