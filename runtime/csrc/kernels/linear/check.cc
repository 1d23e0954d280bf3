#include <algorithm>
#include <cstdint>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bdq {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 28;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("bdq linear: " + what); }

bool one_of(std::int64_t value, std::initializer_list<std::int64_t> allowed) {
  return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_attributes(const LinearSpec& s) {
  const auto text = [](auto value) { return std::to_string(value); };
  if (s.K < 1 || s.K > kLargest) refuse("K is " + text(s.K) + ", expected 1 to 2^28");
  if (s.N < 1 || s.N > kLargest) refuse("N is " + text(s.N) + ", expected 1 to 2^28");
  if (!one_of(s.weight_bits, {2, 3, 4, 8})) refuse("weight_bits is " + text(s.weight_bits) + ", expected 2, 3, 4 or 8");
  if (s.odd_grid && s.weight_bits == 8) refuse("weight_grid is 1 with 8 bits, expected 2, 3 or 4 bits");
  if (!one_of(s.block_size, {0, 32, 64, 128, 256}))
    refuse("block_size is " + text(s.block_size) + ", expected 0, 32, 64, 128 or 256");
  if (!one_of(s.activation_bits, {3, 4, 8, 16}))
    refuse("activation_bits is " + text(s.activation_bits) + ", expected 3, 4, 8 or 16");
  if (!std::isfinite(s.activation_clip) || s.activation_clip <= 0.0f)
    refuse("activation_clip is " + text(s.activation_clip) + ", expected a positive number");
  const int size = s.hadamard_size;
  if (size != 0 && (size < 0 || size > 4096 || (size & (size - 1)) != 0 || s.K % size != 0))
    refuse("hadamard_size is " + text(size) + ", expected a power of two up to 4096 that divides K = " + text(s.K));
  if (s.hadamard_interleave < 1 || s.K % s.hadamard_interleave != 0)
    refuse("hadamard_interleave is " + text(s.hadamard_interleave) + ", expected a positive divisor of K = " + text(s.K));
}

}  // namespace

LinearSizes check_linear(const LinearSpec& s) {
  check_attributes(s);
  if (s.activation_bits != 16) {
    const std::int64_t columns = s.block_size == 0 ? s.K : std::min(s.K, s.block_size);
    const std::int64_t weight = s.odd_grid ? (1 << s.weight_bits) - 1 : 1 << (s.weight_bits - 1);
    const std::int64_t largest = columns * weight * (std::int64_t{1} << (s.activation_bits - 1));
    if (largest > INT32_MAX) refuse("K is " + std::to_string(s.K) + ", its sums do not fit 32 bits; use block_size");
  }
  LinearSizes sizes{};
  sizes.panels = ceil_div(s.N, kLanes) * (s.gate == Gate::kNone ? 1 : 2);
  sizes.chunks = ceil_div(s.K, kChunk);
  sizes.blocks = s.block_size == 0 ? 1 : ceil_div(s.K, s.block_size);
  sizes.weight_bytes = sizes.panels * sizes.chunks * 2 * kChunk * s.weight_bits;  // below 2^58
  sizes.scale_count = sizes.panels * sizes.blocks * kLanes;
  return sizes;
}

}  // namespace bdq
