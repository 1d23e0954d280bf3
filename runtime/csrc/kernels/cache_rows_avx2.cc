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

BDQ_AVX2 __m128i load16(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
BDQ_AVX2 void store16(std::uint8_t* to, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }

BDQ_AVX2 void unpack4(const std::uint8_t* row, std::uint8_t* codes, std::int64_t half) {
  const __m256i low = _mm256_set1_epi8(15);
  std::int64_t i = 0;
  for (; i + 32 <= half; i += 32) {
    const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_and_si256(pair, low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + half + i), _mm256_and_si256(_mm256_srli_epi16(pair, 4), low));
  }
  for (; i + 16 <= half; i += 16) {
    const __m128i pair = load16(row + i);
    store16(codes + i, _mm_and_si128(pair, _mm256_castsi256_si128(low)));
    store16(codes + half + i, _mm_and_si128(_mm_srli_epi16(pair, 4), _mm256_castsi256_si128(low)));
  }
  for (; i < half; ++i) {
    codes[i] = row[i] & 15;
    codes[half + i] = row[i] >> 4;
  }
}

// 64 channels, or a multiple of 128: sixteen channels that follow each other are in two fields, or one, of the plane of high bits.
BDQ_AVX2 void unpack3(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D) {
  const std::int64_t quarter = D / 4, eighth = D / 8;
  const std::uint8_t* high_plane = row + quarter;
  const __m128i low = _mm_set1_epi8(3), one = _mm_set1_epi8(1), fields = _mm_set_epi64x(D == 64 ? 1 : 0, 0);
  for (int t = 0; t < 4; ++t) {
    for (std::int64_t i = 0; i < quarter; i += 16) {
      const std::int64_t channel = t * quarter + i, field = channel / eighth;
      const __m128i word = D == 64 ? _mm_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(high_plane)))
                                   : load16(high_plane + channel % eighth);
      const __m128i bit = _mm_and_si128(_mm_srlv_epi64(word, _mm_add_epi64(fields, _mm_set1_epi64x(field))), one);
      const __m128i part = _mm_and_si128(_mm_srl_epi16(load16(row + i), _mm_cvtsi32_si128(2 * t)), low);
      store16(codes + channel, _mm_or_si128(part, _mm_slli_epi16(bit, 2)));
    }
  }
}

}  // namespace

BDQ_AVX2 void unpack_avx2(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits) {
  if (bits == 4) return unpack4(row, codes, D / 2);
  if (bits == 3 && (D == 64 || D % 128 == 0)) return unpack3(row, codes, D);
  unpack_planes(row, codes, D, bits);
}

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
  unpack_avx2(row, codes, D, bits);
  for (std::int64_t i = 0; i < D; i += 8) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero)), scale));
  }
}

}  // namespace bdq::cache_rows

#endif
