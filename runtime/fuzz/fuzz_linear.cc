// Any attributes, weights and inputs: refused, or computed inside the arrays, and by each instruction set alike.
#include "low_bit_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "input.h"
#include "workers.h"

namespace {

float largest(const std::vector<float>& values) {
  float found = 0.0f;
  for (float value : values) found = std::isfinite(value) ? std::max(found, std::fabs(value)) : INFINITY;
  return found;
}

// x [rows, runs, K / runs] with channels of all runs taking turns, one at a time.
std::vector<float> interleaved(const std::vector<float>& x, std::int64_t K, std::int64_t runs) {
  std::vector<float> y(x.size());
  const std::int64_t length = K / runs;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(x.size()); ++i) {
    const std::int64_t row = i / K * K, channel = i % K;
    y[static_cast<std::size_t>(row + channel % length * runs + channel / length)] = x[static_cast<std::size_t>(i)];
  }
  return y;
}

template <class T>
const T* or_null(bool wanted, const T* pointer) {
  return wanted ? pointer : nullptr;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  bdq::LinearSpec spec;
  spec.K = input.pick<std::int64_t>({1, 7, 31, 32, 63, 64, 65, 96, 128, 130, 192, 256, 320, 576});
  spec.N = input.pick<std::int64_t>({1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100});
  spec.weight_bits = input.pick<int>({2, 3, 4, 8});
  spec.odd_grid = input.take<std::uint8_t>() & 1;
  spec.block_size = input.pick<std::int64_t>({0, 0, 32, 64, 128, 256});
  spec.activation_bits = input.pick<int>({3, 4, 8, 16});
  spec.activation_clip = input.pick<float>({1.0f, 0.9f, 0.5f});
  spec.hadamard_size = input.pick<int>({0, 0, 1, 2, 32, 64, 128});
  spec.hadamard_interleave = spec.hadamard_size == 0 ? 1 : input.pick<int>({1, 1, 2, 3, 4, 9, 64});
  spec.gate = static_cast<bdq::Gate>(input.take<std::uint8_t>() % 3);
  bdq::LinearSizes sizes{};
  try {
    sizes = bdq::check_linear(spec);
  } catch (const std::invalid_argument&) {
    return 0;
  }
  if (sizes.weight_bytes > 1 << 20 || spec.K > 1 << 14 || spec.N > 1 << 14) return 0;

  const std::int64_t M = 1 + input.below(40), halves = spec.gate == bdq::Gate::kNone ? 1 : 2;
  const bool biased = input.take<std::uint8_t>() & 1;
  fuzz::ManyWorkers workers(1 + input.take<std::uint8_t>() % 5);
  const auto weight = input.bytes(sizes.weight_bytes);
  std::unique_ptr<std::uint16_t[]> scales(new std::uint16_t[static_cast<std::size_t>(sizes.scale_count)]);
  const bool wild = input.take<std::uint8_t>() >= 224;  // infinities and NaN too, or 0.125 to 2
  std::uint32_t state = input.take<std::uint32_t>();
  for (std::int64_t i = 0; i < sizes.scale_count; ++i) {
    state = state * 1664525u + 1013904223u;
    scales[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(wild ? state >> 16 : 0x3000 + (state >> 16) % 0x1000);
  }
  const std::vector<float> x = input.floats(M * spec.K), bias = input.floats(halves * spec.N), diagonal = input.floats(spec.K);

  bdq::LinearArguments arguments;
  arguments.diagonal = or_null(spec.hadamard_size > 0, diagonal.data());
  arguments.weight = weight.get();
  arguments.scales = scales.get();
  arguments.bias = or_null(biased, bias.data());
  arguments.M = M;
  std::vector<float> expected(static_cast<std::size_t>(M * spec.N)), found(expected.size());
  arguments.y = expected.data();
  bdq::LinearSpec plain = spec;
  plain.hadamard_interleave = 1;
  const std::vector<float> turned = interleaved(x, spec.K, spec.hadamard_interleave);
  arguments.x = turned.data();
  bdq::low_bit_linear(plain, arguments, bdq::Isa::kScalar, workers);
  arguments.x = x.data();
  const bool exact = spec.block_size == 0 && spec.activation_bits != 16 && spec.gate == bdq::Gate::kNone;
  const float input_size = largest(x), finite_size = input_size * largest(diagonal);
  // What a float sum may be off by, in another order; with a gate it is multiplied by the other half.
  const float sum = static_cast<float>(spec.K << spec.weight_bits) * 4.0f * input_size + largest(bias);
  const float tolerance = 4e-6f * sum * (spec.gate == bdq::Gate::kNone ? 1.0f : sum + 1.0f);
  const bool bounded = !wild && spec.hadamard_size == 0 && tolerance < 1e30f;  // else a gate may overflow
  for (bdq::Isa isa : fuzz::kIsas) {
    if (!bdq::isa_supported(isa)) continue;
    arguments.y = found.data();
    bdq::low_bit_linear(spec, arguments, isa, workers);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const bool same = std::memcmp(&found[i], &expected[i], sizeof(float)) == 0 || (std::isnan(found[i]) && std::isnan(expected[i]));
      if (exact && std::isfinite(finite_size) && !same) std::abort();
      if (!exact && bounded && !(std::fabs(found[i] - expected[i]) <= tolerance)) std::abort();
    }
  }
  return 0;
}
