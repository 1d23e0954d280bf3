#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bdq {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeonDot};

#if defined(__x86_64__)

// What the processor has and the operating system saves on a task switch.
struct Features {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx = false;
};

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

Features read_features() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;  // OSXSAVE
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  unsigned saved_low = 0, saved_high = 0;
  __asm__ volatile("xgetbv" : "=a"(saved_low), "=d"(saved_high) : "c"(0));
  const bool saves_ymm = (saved_low & 0x6u) == 0x6u, saves_zmm = (saved_low & 0xe6u) == 0xe6u;
  const bool saves_tiles = (saved_low & 0x60000u) == 0x60000u;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned leaf7_b = b, leaf7_c = c, leaf7_d = d;
  unsigned more = 0;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
  found.avx2 = saves_ymm && fma && f16c && bit(leaf7_b, 5);
  found.avx_vnni = found.avx2 && bit(more, 4);
  const bool avx512 = bit(leaf7_b, 16) && bit(leaf7_b, 17) && bit(leaf7_b, 30) && bit(leaf7_b, 31);  // f, dq, bw, vl
  found.avx512_vnni = found.avx2 && saves_zmm && avx512 && bit(leaf7_c, 11);
  found.amx = found.avx512_vnni && saves_tiles && bit(leaf7_d, 24) && bit(leaf7_d, 25);  // tile, int8
  return found;
}

// Linux gives a process the 8 KiB of tile registers only when it asks.
bool tiles_allowed() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Features& features() {
  static const Features found = [] {
    Features read = read_features();
    read.amx = read.amx && tiles_allowed();
    return read;
  }();
  return found;
}

#endif

#if defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return true;  // every Apple processor
#endif
}
#endif

std::string supported_names() {
  std::string names;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa choose() {
  const char* wanted = std::getenv("BDQ_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    for (Isa isa : kAll) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa_supported(isa)) return isa;
    }
    throw std::runtime_error("BDQ_ISA is \"" + std::string(wanted) + "\", this processor supports: " + supported_names());
  }
  Isa best = Isa::kScalar;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvxVnni: return "avx_vnni";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAmx: return "amx";
    case Isa::kNeonDot: return "neon_dot";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return true;
#if defined(__x86_64__)
    case Isa::kAvx2: return features().avx2;
    case Isa::kAvxVnni: return features().avx_vnni;
    case Isa::kAvx512Vnni: return features().avx512_vnni;
    case Isa::kAmx: return features().amx;
#elif defined(__aarch64__)
    case Isa::kNeonDot: return has_dot_product();
#endif
    default: return false;
  }
}

Isa selected_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace bdq
