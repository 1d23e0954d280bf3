#include "kernels.h"

#include <cstring>

#include "../rows.h"
#include "vector_tables.h"

namespace bdq::attention {

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAvxVnni: return avx2::kernels;
    case Isa::kAvx512Vnni: return avx512::kernels;
    case Isa::kAmx: {
      static const bool halves = amx::supported();
      return halves ? amx::kernels : avx512::kernels;
    }
#elif defined(__aarch64__)
    case Isa::kNeonDot: return neon::kernels;
#endif
    default: return kScalarKernels;
  }
}

void prepare_head(const Problem& problem, const Kernels& kernels, const float* x, std::int64_t position, float* y) {
  const AttentionArguments& a = problem.arguments;
  const std::int64_t D = problem.spec.head_size;
  if (a.cos_cache != nullptr) {
    const std::int64_t half = a.rotary_dim / 2;
    kernels.rotate(x, a.cos_cache + position * half, a.sin_cache + position * half, y, half);
    std::memcpy(y + a.rotary_dim, x + a.rotary_dim, static_cast<std::size_t>(D - a.rotary_dim) * sizeof(float));
  } else {
    std::memcpy(y, x, static_cast<std::size_t>(D) * sizeof(float));
  }
  if (problem.spec.hadamard) hadamard_row(y, y, D, static_cast<int>(D), problem.isa);
}

}  // namespace bdq::attention
