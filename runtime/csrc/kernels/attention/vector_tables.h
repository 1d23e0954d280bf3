// The tables of x86 instruction sets.
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

}  // namespace bdq::attention
