#include "kernels.h"

#include <stdexcept>
#include <string>

namespace bdq {

const LinearKernels& linear_kernels(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return scalar_linear_kernels();
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAvxVnni:
    case Isa::kAvx512Vnni:
    case Isa::kAmx: return scalar_linear_kernels();
#endif
    default: throw std::invalid_argument("no linear kernels for " + std::string(isa_name(isa)));
  }
}

}  // namespace bdq
