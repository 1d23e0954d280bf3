#include "finish.h"

#include <cmath>
#include <limits>

namespace bdq::attention {

void finish(const Problem& problem, const Block& block, const Partial* partials, std::int64_t splits) {
  const std::int64_t D = problem.spec.head_size;
  for (std::int64_t n = 0; n < block.count; ++n) {
    float* y = problem.output(block.batch, block.kv_head, block.first + n);
    if (splits == 1) {
      const float* o = partials->o + n * D;
      const float factor = 1.0f / partials->l[n];
      for (std::int64_t d = 0; d < D; ++d) y[d] = o[d] * factor;
      continue;
    }
    float m = -std::numeric_limits<float>::infinity();
    for (std::int64_t s = 0; s < splits; ++s) m = std::fmax(m, partials[s].m[n]);
    float l = 0.0f;
    for (std::int64_t d = 0; d < D; ++d) y[d] = 0.0f;
    for (std::int64_t s = 0; s < splits; ++s) {
      if (partials[s].l[n] == 0.0f) continue;  // sees no key, and m may be -inf
      const float weight = std::exp2(partials[s].m[n] - m);
      const float* o = partials[s].o + n * D;
      l += weight * partials[s].l[n];
      for (std::int64_t d = 0; d < D; ++d) y[d] += weight * o[d];
    }
    const float factor = 1.0f / l;
    for (std::int64_t d = 0; d < D; ++d) y[d] *= factor;
  }
}

}  // namespace bdq::attention
