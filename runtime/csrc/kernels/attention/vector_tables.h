// The tables of instruction sets with vectors.
#pragma once

#include "kernels.h"

namespace bdq::attention {

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
bool supported();  // tiles of bfloat16, which Isa::kAmx does not promise
}  // namespace amx
namespace neon {
extern const Kernels kernels;
}

}  // namespace bdq::attention
