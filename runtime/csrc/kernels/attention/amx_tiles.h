// Tiles of AMX: sixteen rows of 64 bytes each, here pairs of bfloat16 or floats.
#pragma once

#include <cstdint>

#include "vectors_avx512.h"

#define BDQ_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,fma")))

namespace bdq::attention::amx {

using Half = std::uint16_t;          // the bits of a bfloat16
constexpr std::int64_t kRows = 16;   // rows of a tile, and floats of one row
constexpr std::int64_t kDepth = 32;  // bfloat16 of one row: products that one instruction adds up
constexpr std::int64_t kTile = kRows * kDepth;
constexpr std::int64_t kKeyTiles = 4;    // of one step of 64 keys
constexpr std::int64_t kKeyChunks = 2;   // the same keys as depth
constexpr std::int64_t kQueryParts = 3;  // bfloat16 that add up to a float32, all 24 bits of it
constexpr std::int64_t kWeightParts = 3;

// All eight tile registers are whole tiles from here to the end of the object.
class Tiles {
 public:
  BDQ_TILES Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  BDQ_TILES ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// GCC does not know that tile instructions read and write memory.
static inline __attribute__((always_inline)) void tile_fence() { __asm__ volatile("" ::: "memory"); }

// logits[16 t ..][16] = keys · queries for key tiles t from begin to end; keys [chunks, kKeyTiles, kTile], queries [chunks, kQueryParts,
// kTile].
void multiply_keys(const Half* keys, const Half* queries, std::int64_t chunks, std::int64_t begin, std::int64_t end, float* logits);

// o[16 t ..][16] += values · weights for channel tiles t; values [tiles, kKeyChunks, kTile], weights [kKeyChunks, kWeightParts, kTile].
void multiply_values(const Half* values, const Half* weights, std::int64_t tiles, std::int64_t begin, std::int64_t end, float* o);

// dots[16 t ..][16] = keys · queries for key tiles t < end; queries [chunks, kTile].
void multiply_few_keys(const Half* keys, const Half* queries, std::int64_t chunks, std::int64_t end, float* dots);

// sums[t][16][16] = weights · values for channel tiles t < tiles; weights [kKeyChunks, kTile], values [kKeyChunks, tiles, kTile].
void multiply_few_values(const Half* weights, const Half* values, std::int64_t tiles, std::int64_t end, float* sums);

// y[j][i] = x[i][j] of 16 x 16 words of 32 bits.
BDQ_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4 a + b] holds in its 128-bit lane l column 4 l + b of rows 4 a .. 4 a + 3.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i low = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88), high = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88), high2 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
    t[b] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[8 + b] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[4 + b] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[12 + b] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace bdq::attention::amx
