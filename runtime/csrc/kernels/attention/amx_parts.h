// A float32 as a sum of bfloat16, each the upper half of what those before it leave.
#pragma once

#include "amx_tiles.h"

namespace bdq::attention::amx {

// The upper halves of the words of two vectors, a's in the lower halves of the result.
BDQ_INLINE __m512i upper_pair(__m512i a, __m512i b) { return _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaau, b); }

BDQ_INLINE __m512 without_upper(__m512 x) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return _mm512_sub_ps(x, _mm512_castsi512_ps(upper));
}

// 32 numbers in order as kQueryParts vectors of 32 bfloat16.
BDQ_INLINE void split32(const float* x, __m512i (&parts)[kQueryParts]) {
  const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17,
                                             15, 13, 11, 9, 7, 5, 3, 1);
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
#pragma GCC unroll 3
  for (int part = 0; part < kQueryParts; ++part) {
    parts[part] = _mm512_permutex2var_epi16(_mm512_castps_si512(a), odd_words, _mm512_castps_si512(b));
    a = without_upper(a);
    b = without_upper(b);
  }
}

}  // namespace bdq::attention::amx
