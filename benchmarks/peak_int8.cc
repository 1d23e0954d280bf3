// 8-bit multiply-accumulates a second of one core in a loop that touches nothing but registers: `peak_int8 ISA`, ISA as
// in BDQ_ISA. Prints one number: what the fastest tenth of its bursts reached, by processor time.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TARGET(features) __attribute__((target(features)))
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
// What `x` holds could be anything now: the compiler neither shares nor moves products.
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#define DECLARE(i) auto sum##i = zero;
#define CONSUME(i) OPAQUE(sum##i);

namespace {

TARGET("avx2") void avx2(std::int64_t steps) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i w = _mm256_set1_epi8(3);
  const __m256i a = _mm256_set1_epi8(1);
  TWELVE(DECLARE)
#define STEP(i) OPAQUE(w); sum##i = _mm256_add_epi16(sum##i, _mm256_maddubs_epi16(w, a));
  for (; steps > 0; --steps) { TWELVE(STEP) }
#undef STEP
  TWELVE(CONSUME)
}

TARGET("avx2,avxvnni") void avx_vnni(std::int64_t steps) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i w = _mm256_set1_epi8(3);
  const __m256i a = _mm256_set1_epi8(1);
  TWELVE(DECLARE)
#define STEP(i) OPAQUE(w); sum##i = _mm256_dpbusd_avx_epi32(sum##i, w, a);
  for (; steps > 0; --steps) { TWELVE(STEP) }
#undef STEP
  TWELVE(CONSUME)
}

TARGET("avx512f,avx512vnni") void avx512_vnni(std::int64_t steps) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i w = _mm512_set1_epi32(0x03030303);
  const __m512i a = _mm512_set1_epi32(0x01010101);
  TWELVE(DECLARE)
#define STEP(i) OPAQUE(w); sum##i = _mm512_dpbusd_epi32(sum##i, w, a);
  for (; steps > 0; --steps) { TWELVE(STEP) }
#undef STEP
  TWELVE(CONSUME)
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TARGET("amx-tile,amx-int8") void amx(std::int64_t steps) {
  const TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (; steps > 0; --steps) {
    _tile_dpbusd(0, 6, 7);
    _tile_dpbusd(1, 6, 7);
    _tile_dpbusd(2, 6, 7);
    _tile_dpbusd(3, 6, 7);
    _tile_dpbusd(4, 6, 7);
    _tile_dpbusd(5, 6, 7);
  }
  _tile_release();
}

bool allowed(const char* isa) {
  if (std::strcmp(isa, "amx") != 0) return true;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Loop {
  const char* isa;
  void (*run)(std::int64_t steps);
  double macs;  // of a step
};

constexpr Loop kLoops[] = {
    {"avx2", avx2, 12 * 32}, {"avx_vnni", avx_vnni, 12 * 32}, {"avx512_vnni", avx512_vnni, 12 * 64}, {"amx", amx, 6 * 16 * 16 * 64}};

double seconds(const Loop& loop, std::int64_t steps) {
  const std::clock_t start = std::clock();
  loop.run(steps);
  return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

double peak(const Loop& loop) {
  constexpr int kBursts = 20;
  constexpr double kBurst = 0.005;
  std::int64_t steps = 1 << 10;
  while (seconds(loop, steps) < kBurst) steps *= 2;
  std::vector<double> times(kBursts);
  for (double& time : times) time = seconds(loop, steps);
  std::sort(times.begin(), times.end());
  return loop.macs * static_cast<double>(steps) / times[kBursts / 10];
}

}  // namespace

int main(int count, char** arguments) {
  for (const Loop& loop : kLoops) {
    if (count != 2 || std::strcmp(arguments[1], loop.isa) != 0 || !allowed(loop.isa)) continue;
    std::printf("%.6g\n", peak(loop));
    return 0;
  }
  std::fprintf(stderr, "no loop for this instruction set\n");
  return 1;
}
#else
int main() {
  std::fprintf(stderr, "no loop for this processor\n");
  return 1;
}
#endif
