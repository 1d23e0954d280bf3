// The rule of docs/ops.md, "One row", in parts that the scalar and the vector code share.
#pragma once

#include <cstdint>
#include <cstring>

namespace bdq::cache_rows {

// Scale and zero point of one row; the last four bytes of it hold both.
struct Grid {
  float scale;
  float inverse;     // 1 / scale
  float zero_point;  // an integer in -32768 .. 32767
  std::uint16_t scale_code;
};

// From the clipped largest and smallest value of the row.
Grid make_grid(float hi, float lo, int bits);

// Writes and reads the last four bytes of a row.
inline void store_grid(const Grid& grid, std::uint8_t* tail) {
  const int zero = static_cast<int>(grid.zero_point) + 32768;
  tail[0] = static_cast<std::uint8_t>(grid.scale_code);
  tail[1] = static_cast<std::uint8_t>(grid.scale_code >> 8);
  tail[2] = static_cast<std::uint8_t>(zero);
  tail[3] = static_cast<std::uint8_t>(zero >> 8);
}

inline float scale_of(const std::uint8_t* tail) {
  const std::uint32_t bits = (std::uint32_t{tail[0]} | std::uint32_t{tail[1]} << 8) << 13;
  const std::uint32_t word = bits + (95u << 23);
  float scale;
  std::memcpy(&scale, &word, sizeof scale);
  return scale;
}

inline int zero_point_of(const std::uint8_t* tail) { return (tail[2] | tail[3] << 8) - 32768; }

// Codes [D], one a byte, to and from the planes of a row.
void pack_planes(const std::uint8_t* codes, std::uint8_t* row, std::int64_t D, int bits);
void unpack_planes(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits);

constexpr std::int64_t kMaxHeadSize = 4096;  // check_attention

// The scalar code, which every instruction set agrees with bit for bit.
void quantize_scalar(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip);
void dequantize_scalar(const std::uint8_t* row, float* x, std::int64_t D, int bits);

#if defined(__x86_64__)
void quantize_avx2(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip);
void dequantize_avx2(const std::uint8_t* row, float* x, std::int64_t D, int bits);
void unpack_avx2(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits);  // the same as unpack_planes
#elif defined(__aarch64__)
void quantize_neon(const float* x, std::uint8_t* row, std::int64_t D, int bits, float clip);
void dequantize_neon(const std::uint8_t* row, float* x, std::int64_t D, int bits);
void unpack_neon(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits);  // the same as unpack_planes
#endif

}  // namespace bdq::cache_rows
