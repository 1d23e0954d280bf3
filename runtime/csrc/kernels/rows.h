// What happens to one row before a matmul or a cache: docs/ops.md, "Activations", "Hadamard", "One row". All of it exact.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bdq {

// x and y [K]; y may be x. size is a power of two that divides K.
void hadamard_row(const float* x, float* y, std::int64_t K, int size, Isa isa);

// y[j * runs + i] = x[i * (K / runs) + j]: channels [runs, K / runs] transposed. runs divides K; y is not x.
void interleave_row(const float* x, float* y, std::int64_t K, std::int64_t runs);

// Codes q [K], bytes up to padded_K set to 0; returns s. sum is Σ q.
float quantize_row(const float* x, std::int8_t* q, std::int64_t K, std::int64_t padded_K, int bits, float clip,
                   std::int32_t* sum, Isa isa);

// One row of the KV cache: D * bits / 8 + 4 bytes.
void quantize_cache_row(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip, Isa isa);
void dequantize_cache_row(const std::uint8_t* row, float* x, std::int64_t D, int bits, Isa isa);

}  // namespace bdq
