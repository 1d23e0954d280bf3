// Which instruction set the kernels use: the best that this processor has, or the one that BDQ_ISA names.
#pragma once

namespace bdq {

enum class Isa { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kNeonDot };

// "scalar", "avx2", "avx_vnni", "avx512_vnni", "amx", "neon_dot".
const char* isa_name(Isa isa);

// Whether this processor and operating system can run it (for AMX, permission is asked for once).
bool isa_supported(Isa isa);

// Read once. Throws std::runtime_error, naming what is supported, when BDQ_ISA is unknown or not supported here.
Isa selected_isa();

}  // namespace bdq
