// What an instruction set has to provide for the linear operators: one table of functions each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../isa.h"
#include "../low_bit_linear.h"

namespace bdq {

constexpr std::int64_t kLanes = 16;      // output channels of a panel
constexpr std::int64_t kChunk = 64;      // input channels of a chunk
constexpr std::int64_t kRowTile = 16;    // rows of activations that lie together when there are many
constexpr std::int64_t kGemvRows = 4;    // up to so many rows a weight is decoded in registers, and read once

// Where the codes of one row go: code k is at codes[(k / 64) * chunk_stride + k % 64].
struct RowTarget {
  std::int8_t* codes = nullptr;
  std::int64_t chunk_stride = kChunk;
  std::int32_t* sums = nullptr;    // [sum_count]: Σ q of each `sum_columns` columns
  std::int64_t sum_count = 1;
  std::int64_t sum_columns = 0;    // a multiple of 32
};

// Activations of M rows, ready to be multiplied: codes, or floats where they stay floats.
//   codes: row r at (r / T) * T * padded_K + (r % T) * 64, its chunks T * 64 apart, T = 1 or kRowTile; rows beyond M are 0
//   floats: [M, float_stride], 0 from column K on up to the next multiple of 64
struct Activations {
  std::int64_t M = 0;
  std::int64_t row_tile = 1;
  const std::int8_t* codes = nullptr;
  const float* scales = nullptr;         // [M]
  const std::int32_t* offsets = nullptr; // [M, sum_count]: minus the weights' zero point times Σ q
  const float* floats = nullptr;
  std::int64_t float_stride = 0;
};

// One multiplication. A group is two neighbouring panels: 32 output channels, or 16 of a gated operator.
struct Multiplication {
  LinearSpec spec;
  LinearSizes sizes;
  Activations a;
  const std::uint8_t* weight = nullptr;
  const std::uint16_t* scales = nullptr;
  const float* bias = nullptr;
  float* y = nullptr;
  std::int64_t sum_count = 1;

  std::int64_t padded_K() const { return sizes.chunks * kChunk; }
  std::int64_t panel_bytes() const { return sizes.chunks * 2 * kChunk * spec.weight_bits; }
  int zero_point() const { return spec.odd_grid ? (1 << spec.weight_bits) - 1 : 1 << (spec.weight_bits - 1); }
  const std::int8_t* codes(std::int64_t row) const {
    return a.codes + (row / a.row_tile) * a.row_tile * padded_K() + (row % a.row_tile) * kChunk;
  }
};

struct LinearKernels {
  // docs/ops.md, "Hadamard"; then times diagonal unless that is null. y may be x.
  void (*hadamard)(const float* x, const float* diagonal, float* y, std::int64_t K, int size);
  // docs/ops.md, "Activations"; fills columns K .. padded_K with 0. Returns the scale.
  float (*quantize)(const float* x, std::int64_t K, std::int64_t padded_K, int bits, float clip, const RowTarget& target);
  // Rows [row_begin, row_end), groups [group_begin, group_end) of y. row_begin is a multiple of kRowTile.
  void (*multiply)(const Multiplication& m, std::int64_t row_begin, std::int64_t row_end, std::int64_t group_begin,
                   std::int64_t group_end, std::uint8_t* scratch);
  // Bytes of scratch, aligned to 64, for `rows` rows.
  std::size_t (*scratch_bytes)(const Multiplication& m, std::int64_t rows);
};

const LinearKernels& scalar_linear_kernels();
#if defined(__x86_64__)
const LinearKernels& avx2_linear_kernels();
const LinearKernels& avx_vnni_linear_kernels();
const LinearKernels& avx512_vnni_linear_kernels();
const LinearKernels& amx_linear_kernels();
#elif defined(__aarch64__)
const LinearKernels& neon_dot_linear_kernels();
#endif

const LinearKernels& linear_kernels(Isa isa);

}  // namespace bdq
