// AVX2: 8-bit products in pairs of 16 bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../kernels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 inside its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
namespace bdq {
namespace {

#include "vector256.inl.h"
#include "common.inl.h"

// _mm256_maddubs_epi16 saturates at 16 bits: codes of 8 bits go through it as two halves of 4.
struct PairDot {
  static constexpr bool kPairs = true;
  static __m256i add_pairs(__m256i pairs, __m256i w, __m256i a) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, a));
    __asm__("" : "+x"(pairs));  // gcc would add the products of several quads first, and keep them in memory for that
    return pairs;
  }
  static __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  static __m256i halves(__m256i w, __m256i a) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, mask), a);
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), mask), a);
    return _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  template <bool wide> static __m256i dot(__m256i acc, __m256i w, __m256i a) {
    if constexpr (wide) return _mm256_add_epi32(acc, halves(w, a));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
  }
  static __m256i quad(const std::int8_t* a) {
    std::int32_t four;
    __builtin_memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
  }
  template <int bits> BDQ_INLINE static void dot8(__m256i& acc, __m256i& other, const __m256i (&w)[8], const std::int8_t* a) {
    if constexpr (bits == 8) {
      each<4>([&](auto i) BDQ_INLINE {
        acc = dot<true>(acc, w[2 * i.value], quad(a + 8 * i.value));
        other = dot<true>(other, w[2 * i.value + 1], quad(a + 8 * i.value + 4));
      });
    } else {  // a pair is at most 15 * 128 * 2 here, so 8 of them fit 16 bits
      __m256i pairs = _mm256_maddubs_epi16(w[0], quad(a));
      each<7>([&](auto i) BDQ_INLINE {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i.value + 1], quad(a + 4 * i.value + 4)));
      });
      acc = _mm256_add_epi32(acc, widened(pairs));
    }
  }
};

}  // namespace

const LinearKernels& avx2_linear_kernels() {
  static constexpr LinearKernels table{hadamard<Vector256>, quantize<Vector256>, multiply<Vector256, PairDot>, scratch_bytes};
  return table;
}

}  // namespace bdq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
