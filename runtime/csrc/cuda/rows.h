// What is done to rows before a matmul: the kernels of bdq_runtime/gpu/kernels/rows.py.
#pragma once

#include "launcher.h"

namespace bdq::cuda {

struct Hadamard {
  int size = 0;                    // 0: none
  const float* diagonal = nullptr;  // [K], or null
  int interleave = 1;               // runs of channels that take turns first
};

// Codes int8 [M, padded], scales [M], totals [M], sums of each 32 codes [M, padded / 32] or null.
struct Codes {
  std::int8_t* codes;
  float* scales;
  std::int32_t* totals;
  std::int32_t* sums;
};

// y [M, K] = Hadamard(x) * diagonal; y may be x unless channels are interleaved.
void hadamard_rows(Launcher& launcher, const float* x, float* y, std::int64_t M, std::int64_t K, const Hadamard& hadamard);

// Codes of x, or of Hadamard(x) * diagonal, with the columns of each group of 4 << log_fields in the order of rows.py.
Codes quantize_rows(Launcher& launcher, const float* x, std::int64_t M, std::int64_t K, std::int64_t padded, int bits, float clip,
                    int log_fields, bool sums, const Hadamard& hadamard);

// y [M, K] = the nearest points of each row's grid; y may be x.
void fake_quantize_rows(Launcher& launcher, const float* x, float* y, std::int64_t M, std::int64_t K, int bits, float clip);

struct HadamardConstants {
  std::int32_t log_n;
  float grid, root;  // 2^-R, 1 / sqrt(n)
};
HadamardConstants hadamard_constants(std::int64_t size);

}  // namespace bdq::cuda
