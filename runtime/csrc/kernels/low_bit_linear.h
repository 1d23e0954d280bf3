// y = x Wᵀ with low-bit weights and activations: docs/ops.md, "Linear operators". No ONNX Runtime in here.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace bdq {

enum class Gate { kNone, kSilu, kGeluTanh };

struct LinearSpec {
  std::int64_t K = 0;
  std::int64_t N = 0;              // output channels; of each half when gated
  int weight_bits = 4;             // 2, 3, 4, 8
  bool odd_grid = false;
  std::int64_t block_size = 0;     // 0: one scale for each channel
  int activation_bits = 8;         // 3, 4, 8, 16 (float)
  float activation_clip = 1.0f;
  int hadamard_size = 0;           // 0: no Hadamard and no diagonal in front
  int hadamard_interleave = 1;     // runs of channels that take turns before the Hadamard; 1: they stay where they are
  Gate gate = Gate::kNone;
};

struct LinearArguments {
  const float* x = nullptr;              // [M, K]
  const float* diagonal = nullptr;       // [K]; only with a Hadamard
  const std::uint8_t* weight = nullptr;  // [P, C, 128 * weight_bits]
  const std::uint16_t* scales = nullptr; // float16 bits [P, B, 16]
  const float* bias = nullptr;           // [N], [2 N] when gated, or null
  float* y = nullptr;                    // [M, N]
  std::int64_t M = 0;
};

// Bytes of weight and numbers of scales that `spec` asks for. Throws std::invalid_argument, in one line, for a spec that no
// operator may have (bits, sizes that overflow, a Hadamard that does not divide K, ...).
struct LinearSizes {
  std::int64_t panels, chunks, blocks;
  std::int64_t weight_bytes, scale_count;
};
LinearSizes check_linear(const LinearSpec& spec);

// Computes y. `spec` was checked; the arrays have the sizes it asks for. Every instruction set gives the same bits where docs/ops.md
// says exact.
void low_bit_linear(const LinearSpec& spec, const LinearArguments& arguments, Isa isa, Parallel& parallel);

}  // namespace bdq
