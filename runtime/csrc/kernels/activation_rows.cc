// rows.h: interleaving, and one row through the kernels of the linear operators.
#include <algorithm>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "linear/kernels.h"
#include "rows.h"

namespace bdq {
namespace {

#if defined(__x86_64__) || defined(__aarch64__)
// Channels j .. j + 3 of runs i .. i + 3.
inline void interleave_4x4(const float* x, float* y, std::int64_t length, std::int64_t runs) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + length), c = _mm_loadu_ps(x + 2 * length), d = _mm_loadu_ps(x + 3 * length);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(y, a);
  _mm_storeu_ps(y + runs, b);
  _mm_storeu_ps(y + 2 * runs, c);
  _mm_storeu_ps(y + 3 * runs, d);
#else
  const float32x4x2_t a = vtrnq_f32(vld1q_f32(x), vld1q_f32(x + length));
  const float32x4x2_t b = vtrnq_f32(vld1q_f32(x + 2 * length), vld1q_f32(x + 3 * length));
  vst1q_f32(y, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
  vst1q_f32(y + runs, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
  vst1q_f32(y + 2 * runs, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
  vst1q_f32(y + 3 * runs, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
#endif
}
#endif

}  // namespace

void hadamard_row(const float* x, float* y, std::int64_t K, int size, Isa isa) {
  linear_kernels(isa).hadamard(x, nullptr, y, K, size);
}

void interleave_row(const float* x, float* y, std::int64_t K, std::int64_t runs) {
  const std::int64_t length = K / runs;
#if defined(__x86_64__) || defined(__aarch64__)
  if (runs >= 4 && length >= 4) {  // the last 4 of each overlap those before: 0.4 of the time of single floats
    for (std::int64_t i = 0; i < runs; i += 4) {
      const std::int64_t run = std::min(i, runs - 4);
      for (std::int64_t j = 0; j < length; j += 4) {
        const std::int64_t channel = std::min(j, length - 4);
        interleave_4x4(x + run * length + channel, y + channel * runs + run, length, runs);
      }
    }
    return;
  }
#endif
  for (std::int64_t j = 0; j < length; ++j) {
    for (std::int64_t i = 0; i < runs; ++i) y[j * runs + i] = x[i * length + j];
  }
}

float quantize_row(const float* x, std::int8_t* q, std::int64_t K, std::int64_t padded_K, int bits, float clip,
                   std::int32_t* sum, Isa isa) {
  std::int32_t total = 0;
  RowTarget target;
  target.codes = q;
  target.sums = &total;
  target.sum_columns = padded_K < kChunk ? kChunk : padded_K;
  const float scale = linear_kernels(isa).quantize(x, K, padded_K, bits, clip, target);
  if (sum != nullptr) *sum = total;
  return scale;
}

}  // namespace bdq
