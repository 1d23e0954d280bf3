// 8 x 8 floats turned.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace bdq::attention {

// y[j][i] = x[i][j]; rows are x_stride and y_stride apart.
static inline __attribute__((always_inline)) void transpose8(const float* x, std::int64_t x_stride, float* y, std::int64_t y_stride) {
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      const float* from = x + i * x_stride + j;
      const float32x4x2_t a = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + x_stride));
      const float32x4x2_t b = vtrnq_f32(vld1q_f32(from + 2 * x_stride), vld1q_f32(from + 3 * x_stride));
      float* to = y + j * y_stride + i;
      vst1q_f32(to, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
      vst1q_f32(to + y_stride, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
      vst1q_f32(to + 2 * y_stride, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
      vst1q_f32(to + 3 * y_stride, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }
  }
}

}  // namespace bdq::attention
