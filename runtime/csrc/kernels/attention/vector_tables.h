// The tables of x86 instruction sets.
#pragma once

#include "kernels.h"

namespace bdq::attention {

namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace bdq::attention
