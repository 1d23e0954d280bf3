// AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../kernels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 inside its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#endif
namespace bdq {
namespace {

#include "vector512.inl.h"
#include "common.inl.h"
#include "vnni512.inl.h"

}  // namespace

const LinearKernels& avx512_vnni_linear_kernels() {
  static constexpr LinearKernels table{hadamard<Vector512>, quantize<Vector512>, multiply<Vector512, VnniDot>, scratch_bytes};
  return table;
}

}  // namespace bdq
#if defined(__clang__)
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
