#if defined(__x86_64__)

#include "amx_rows.h"

#include <cstring>

#include "../cache_rows.h"
#include "lanes.h"

namespace bdq::attention::amx {
namespace {

// Words of integers -255 .. 255 as bfloat16: the upper half of the float.
BDQ_INLINE __m512i to_half(__m512i words) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(words)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(words, 1)));
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// Integers -16 .. 15 in the order of their low five bits.
BDQ_INLINE __m512i small_halves() {
  alignas(64) std::int16_t integers[32];
  for (int i = 0; i < 32; ++i) integers[i] = static_cast<std::int16_t>(i < 16 ? i : i - 32);
  return to_half(_mm512_load_si512(integers));
}

// One row: 32 channels of chunk c to out + c * chunk_step.
BDQ_VECTOR void unpack_row(const std::uint8_t* row, std::int64_t D, int bits, int zero, __m512i table, Half* out, std::int64_t chunk_step,
                           std::uint8_t* codes) {
  const __m512i offset = _mm512_set1_epi16(static_cast<std::int16_t>(zero));
  if (bits == 4 && D % 64 == 0) {
    const __m512i low = _mm512_set1_epi16(15);
    const std::int64_t half = D / 2;
    for (std::int64_t i = 0; i < half; i += kDepth) {
      const __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
      const __m512i a = _mm512_sub_epi16(_mm512_and_si512(pair, low), offset), b = _mm512_sub_epi16(_mm512_srli_epi16(pair, 4), offset);
      _mm512_storeu_si512(out + i / kDepth * chunk_step, _mm512_permutexvar_epi16(a, table));
      _mm512_storeu_si512(out + (half + i) / kDepth * chunk_step, _mm512_permutexvar_epi16(b, table));
    }
    return;
  }
  cache_rows::unpack_avx2(row, codes, D, bits);
  for (std::int64_t d = 0; d < D; d += kDepth) {
    const __m512i words = _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d))), offset);
    _mm512_storeu_si512(out + d / kDepth * chunk_step, bits == 8 ? to_half(words) : _mm512_permutexvar_epi16(words, table));
  }
}

// Scale and zero point of row j; returns the part of the zero point that codes can take.
int take_grid(const std::uint8_t* tail, int bits, std::int64_t j, RowGrids& grids) {
  const int zero = cache_rows::zero_point_of(tail), top = (1 << bits) - 1;
  const int taken = zero < 0 ? 0 : zero > top ? top : zero;
  grids.scales[j] = cache_rows::scale_of(tail);
  grids.remainders[j] = static_cast<float>(zero - taken);
  grids.any_remainder |= zero != taken;
  return taken;
}

void clear_grids(std::int64_t count, RowGrids& grids) {
  grids.any_remainder = false;
  for (std::int64_t j = count; j < kKeys; ++j) grids.scales[j] = grids.remainders[j] = 0.0f;
}

// `count` rows to words [rounded, padded], the rest of them 0.
BDQ_VECTOR void unpack_words(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, std::int64_t rounded,
                             RowGrids& grids, Half* words, std::uint8_t* scratch) {
  const __m512i table = small_halves();
  const std::int64_t padded = round_up(D, kDepth);
  clear_grids(count, grids);
  for (std::int64_t j = 0; j < count; ++j, rows += row_bytes) {
    const int zero = take_grid(rows + row_bytes - 4, bits, j, grids);
    unpack_row(rows, D, bits, zero, table, words + j * padded, kDepth, scratch);
  }
  memset(words + count * padded, 0, static_cast<std::size_t>((rounded - count) * padded) * sizeof(Half));
}

}  // namespace

BDQ_VECTOR void unpack_keys(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* keys,
                            RowGrids& grids, std::uint8_t* scratch) {
  const __m512i table = small_halves();
  clear_grids(count, grids);
  for (std::int64_t j = 0; j < count; ++j, rows += row_bytes) {
    const int zero = take_grid(rows + row_bytes - 4, bits, j, grids);
    unpack_row(rows, D, bits, zero, table, keys + j / kRows * kTile + j % kRows * kDepth, kKeyTiles * kTile, scratch);
  }
}

BDQ_VECTOR void unpack_value_pairs(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* values,
                                   RowGrids& grids, Half* words, std::uint8_t* scratch) {
  const std::int64_t padded = round_up(D, kDepth), rounded = round_up(count, kDepth);
  unpack_words(rows, row_bytes, D, bits, count, rounded, grids, words, scratch);
  for (std::int64_t j = 0; j < rounded; j += 2) {
    Half* to = values + j / kDepth * 2 * padded / kDepth * kTile + j % kDepth / 2 * kDepth;
    for (std::int64_t d = 0; d < D; d += kDepth, to += 2 * kTile) {
      const __m512i a = _mm512_loadu_si512(words + j * padded + d), b = _mm512_loadu_si512(words + (j + 1) * padded + d);
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
    }
  }
}

BDQ_VECTOR void unpack_values(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* values,
                              RowGrids& grids, Half* words, std::uint8_t* scratch) {
  const std::int64_t padded = round_up(D, kDepth), rounded = round_up(count, kDepth);
  unpack_words(rows, row_bytes, D, bits, count, rounded, grids, words, scratch);
  // 32 keys x 32 channels at a time: pairs of keys side by side, then pairs and channels change places.
  for (std::int64_t j = 0; j < rounded; j += kDepth) {
    for (std::int64_t d = 0; d < D; d += kDepth) {
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i a = _mm512_loadu_si512(words + (j + 2 * i) * padded + d), b = _mm512_loadu_si512(words + (j + 2 * i + 1) * padded + d);
        low[i] = _mm512_unpacklo_epi16(a, b);
        high[i] = _mm512_unpackhi_epi16(a, b);
      }
      transpose16(low);
      transpose16(high);
      Half* to = values + (d / kRows * kKeyChunks + j / kDepth) * kTile;
      for (int i = 0; i < 16; ++i) {
        // Unpacking took channels 0-3 of each eight to `low` and 4-7 to `high`.
        const std::int64_t channel = i / 4 * 8 + i % 4;
        Half* tile = to + channel / kRows * kKeyChunks * kTile + channel % kRows * kDepth;
        _mm512_storeu_si512(tile, low[i]);
        _mm512_storeu_si512(tile + 4 * kDepth, high[i]);
      }
    }
  }
}

}  // namespace bdq::attention::amx

#endif
