#include "kernels.h"

#include <stdexcept>
#include <string>

namespace bdq {

const LinearKernels& linear_kernels(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return scalar_linear_kernels();
#if defined(__x86_64__)
    case Isa::kAvx2: return avx2_linear_kernels();
    case Isa::kAvxVnni: return avx_vnni_linear_kernels();
    case Isa::kAvx512Vnni: return avx512_vnni_linear_kernels();
    case Isa::kAmx: return amx_linear_kernels();
#elif defined(__aarch64__)
    case Isa::kNeonDot: return neon_dot_linear_kernels();
#endif
    default: throw std::invalid_argument("no linear kernels for " + std::string(isa_name(isa)));
  }
}

}  // namespace bdq
