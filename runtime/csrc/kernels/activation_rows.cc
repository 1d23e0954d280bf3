// hadamard_row and quantize_row of rows.h: one row through the kernels of the linear operators.
#include "linear/kernels.h"
#include "rows.h"

namespace bdq {

void hadamard_row(const float* x, float* y, std::int64_t K, int size, Isa isa) {
  linear_kernels(isa).hadamard(x, nullptr, y, K, size);
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
