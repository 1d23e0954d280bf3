// AVX-VNNI: vpdpbusd on 256 bits, for processors without AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../kernels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 inside its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#endif
namespace bdq {
namespace {

#include "vector256.inl.h"
#include "common.inl.h"

struct VnniDot {
  static constexpr bool kPairs = false;  // D::add_pairs and D::widened: sums of two products, in 16 bits
  template <bool wide> static __m256i dot(__m256i acc, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
  template <int bits> BDQ_INLINE static void dot8(__m256i& acc, __m256i& other, const __m256i (&w)[8], const std::int8_t* a) {
    each<8>([&](auto i) BDQ_INLINE {
      std::int32_t four;
      __builtin_memcpy(&four, a + 4 * i.value, 4);
      __m256i& to = i.value % 2 == 0 ? acc : other;
      to = _mm256_dpbusd_avx_epi32(to, w[i.value], _mm256_set1_epi32(four));
    });
  }
};

}  // namespace

const LinearKernels& avx_vnni_linear_kernels() {
  static constexpr LinearKernels table{hadamard<Vector256>, quantize<Vector256>, multiply<Vector256, VnniDot>, scratch_bytes};
  return table;
}

}  // namespace bdq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
