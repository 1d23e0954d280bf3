// Instruction sets by name, for a session that asks for one.
#pragma once

#include <stdexcept>
#include <string>

#include "../kernels/isa.h"

namespace bdq {

constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeonDot};

// Throws std::invalid_argument, naming what is supported, for one that is unknown or not supported here.
inline Isa isa_of(const std::string& name) {
  std::string supported;
  for (Isa isa : kIsas) {
    if (!isa_supported(isa)) continue;
    if (name == isa_name(isa)) return isa;
    supported += (supported.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("instruction set " + name + " is not supported here, expected one of " + supported);
}

}  // namespace bdq
