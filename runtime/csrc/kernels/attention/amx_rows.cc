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

// Scales and remainders of `count` rows, and twice in each of zeros [64] the part of the zero point that codes can take.
BDQ_VECTOR void take_grids(const std::uint8_t* rows, std::int64_t row_bytes, int bits, std::int64_t count, RowGrids& grids,
                           std::int32_t* zeros) {
  const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), top = _mm512_set1_epi32((1 << bits) - 1);
  const __m512i offsets = _mm512_mullo_epi32(order, _mm512_set1_epi32(static_cast<int>(row_bytes)));
  grids.any_remainder = false;
  for (std::int64_t j = 0; j < kKeys; j += 16) {
    const std::int64_t left = count - j;
    const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
    const std::uint8_t* tails = left > 0 ? rows + (j + 1) * row_bytes - 4 : rows;
    const __m512i tail = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, offsets, tails, 1);
    const __m512i scale = _mm512_slli_epi32(_mm512_and_si512(tail, _mm512_set1_epi32(0xffff)), 13);
    const __m512i zero = _mm512_sub_epi32(_mm512_srli_epi32(tail, 16), _mm512_set1_epi32(32768));
    const __m512i taken = _mm512_min_epi32(_mm512_max_epi32(zero, _mm512_setzero_si512()), top);
    _mm512_storeu_si512(grids.scales + j, _mm512_maskz_add_epi32(some, scale, _mm512_set1_epi32(95 << 23)));
    _mm512_storeu_ps(grids.remainders + j, _mm512_maskz_cvtepi32_ps(some, _mm512_sub_epi32(zero, taken)));
    _mm512_storeu_si512(zeros + j, _mm512_or_si512(taken, _mm512_slli_epi32(taken, 16)));
    grids.any_remainder |= _mm512_mask_cmpneq_epi32_mask(some, zero, taken) != 0;
  }
}

// 32 bytes of codes of 4 bits: 32 channels in their low halves, 32 others in their high halves.
BDQ_INLINE void take_nibbles(const std::uint8_t* bytes, __m512i zero, __m512i table, __m512i& low, __m512i& high) {
  const __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  low = _mm512_permutexvar_epi16(_mm512_sub_epi16(_mm512_and_si512(pair, _mm512_set1_epi16(15)), zero), table);
  high = _mm512_permutexvar_epi16(_mm512_sub_epi16(_mm512_srli_epi16(pair, 4), zero), table);
}

bool whole_nibbles(std::int64_t D, int bits) { return bits == 4 && D % 64 == 0; }

bool whole_threes(std::int64_t D, int bits) { return bits == 3 && (D == 64 || D == 128 || D == 256); }

// 64 codes of 3 bits, channels 64 * block and on. A plane of D / 4 bytes is repeated until it fills a vector, as that of D / 8 bytes is;
// each repetition is shifted to another field.
BDQ_INLINE __m512i take_threes(const std::uint8_t* row, std::int64_t D, std::int64_t block) {
  const __m512i parts = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const std::uint8_t* top = row + D / 4;
  __m512i low, high, low_field, high_field;
  if (D == 64) {
    low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    high = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(top)));
    low_field = _mm512_srli_epi64(parts, 1);
    high_field = parts;
  } else if (D == 128) {
    low = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(top)));
    low_field = _mm512_add_epi64(_mm512_srli_epi64(parts, 2), _mm512_set1_epi64(2 * block));
    high_field = _mm512_add_epi64(_mm512_srli_epi64(parts, 1), _mm512_set1_epi64(4 * block));
  } else {
    low = _mm512_loadu_si512(row);
    high = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(top)));
    low_field = _mm512_set1_epi64(block);
    high_field = _mm512_add_epi64(_mm512_srli_epi64(parts, 2), _mm512_set1_epi64(2 * block));
  }
  const __m512i two = _mm512_and_si512(_mm512_srlv_epi64(low, _mm512_slli_epi64(low_field, 1)), _mm512_set1_epi8(3));
  const __m512i one = _mm512_and_si512(_mm512_rorv_epi64(high, _mm512_sub_epi64(high_field, _mm512_set1_epi64(2))), _mm512_set1_epi8(4));
  return _mm512_or_si512(two, one);
}

// Codes of 32 channels to integers.
BDQ_INLINE __m512i take_bytes(__m256i codes, __m512i zero, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_sub_epi16(_mm512_cvtepu8_epi16(codes), zero), table);
}

// One row: 32 channels of chunk c to out + c * chunk_step.
BDQ_INLINE void unpack_row(const std::uint8_t* row, std::int64_t D, int bits, __m512i zero, __m512i table, Half* out,
                           std::int64_t chunk_step, std::uint8_t* codes) {
  if (whole_nibbles(D, bits)) {
    for (std::int64_t i = 0; i < D / 2; i += kDepth) {
      __m512i low, high;
      take_nibbles(row + i, zero, table, low, high);
      _mm512_storeu_si512(out + i / kDepth * chunk_step, low);
      _mm512_storeu_si512(out + (D / 2 + i) / kDepth * chunk_step, high);
    }
    return;
  }
  if (whole_threes(D, bits)) {
    for (std::int64_t block = 0; block < D / 64; ++block, out += 2 * chunk_step) {
      const __m512i threes = take_threes(row, D, block);
      _mm512_storeu_si512(out, take_bytes(_mm512_castsi512_si256(threes), zero, table));
      _mm512_storeu_si512(out + chunk_step, take_bytes(_mm512_extracti64x4_epi64(threes, 1), zero, table));
    }
    return;
  }
  cache_rows::unpack_avx2(row, codes, D, bits);
  for (std::int64_t d = 0; d < D; d += kDepth) {
    const __m512i words = _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + d))), zero);
    _mm512_storeu_si512(out + d / kDepth * chunk_step, bits == 8 ? to_half(words) : _mm512_permutexvar_epi16(words, table));
  }
}

// `count` rows to words [rounded, padded], the rest of them 0.
BDQ_VECTOR void unpack_words(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count,
                             std::int64_t rounded, const std::int32_t* zeros, Half* words, std::uint8_t* scratch) {
  const __m512i table = small_halves();
  const std::int64_t padded = round_up(D, kDepth);
  for (std::int64_t j = 0; j < count; ++j) {
    unpack_row(rows + j * row_bytes, D, bits, _mm512_set1_epi32(zeros[j]), table, words + j * padded, kDepth, scratch);
  }
  memset(words + count * padded, 0, static_cast<std::size_t>((rounded - count) * padded) * sizeof(Half));
}

}  // namespace

BDQ_VECTOR void unpack_keys(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* keys,
                            RowGrids& grids, std::uint8_t* scratch) {
  const __m512i table = small_halves();
  alignas(64) std::int32_t zeros[kKeys];
  take_grids(rows, row_bytes, bits, count, grids, zeros);
  for (std::int64_t j = 0; j < count; ++j) {
    Half* to = keys + j / kRows * kTile + j % kRows * kDepth;
    unpack_row(rows + j * row_bytes, D, bits, _mm512_set1_epi32(zeros[j]), table, to, kKeyTiles * kTile, scratch);
  }
  for (std::int64_t j = count; j < round_up(count, kRows); ++j) {
    Half* to = keys + j / kRows * kTile + j % kRows * kDepth;
    for (std::int64_t d = 0; d < D; d += kDepth, to += kKeyTiles * kTile) _mm512_storeu_si512(to, _mm512_setzero_si512());
  }
}

BDQ_VECTOR void unpack_value_pairs(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count,
                                   Half* values, RowGrids& grids, Half* words, std::uint8_t* scratch) {
  const __m512i table = small_halves();
  const std::int64_t padded = round_up(D, kDepth), rounded = round_up(count, kDepth);
  alignas(64) std::int32_t zeros[kKeys];
  take_grids(rows, row_bytes, bits, count, grids, zeros);
  std::int64_t j = 0;
  for (; whole_nibbles(D, bits) && j + 2 <= count; j += 2) {
    const std::uint8_t* row = rows + j * row_bytes;
    const __m512i zero = _mm512_set1_epi32(zeros[j]), next_zero = _mm512_set1_epi32(zeros[j + 1]);
    Half* to = values + j / kDepth * kDepth * padded + j % kDepth / 2 * kDepth;
    for (std::int64_t i = 0; i < D / 2; i += kDepth) {
      __m512i low, high, next_low, next_high;
      take_nibbles(row + i, zero, table, low, high);
      take_nibbles(row + row_bytes + i, next_zero, table, next_low, next_high);
      Half* tile = to + 2 * i / kDepth * kTile;
      _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(low, next_low));
      _mm512_storeu_si512(tile + kTile, _mm512_unpackhi_epi16(low, next_low));
      tile += D / kDepth * kTile;
      _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(high, next_high));
      _mm512_storeu_si512(tile + kTile, _mm512_unpackhi_epi16(high, next_high));
    }
  }
  // Rows of other widths, the last of an odd number, and zeros.
  unpack_words(rows + j * row_bytes, row_bytes, D, bits, count - j, rounded - j, zeros + j, words + j * padded, scratch);
  for (; j < rounded; j += 2) {
    Half* to = values + j / kDepth * kDepth * padded + j % kDepth / 2 * kDepth;
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
  alignas(64) std::int32_t zeros[kKeys];
  take_grids(rows, row_bytes, bits, count, grids, zeros);
  unpack_words(rows, row_bytes, D, bits, count, rounded, zeros, words, scratch);
  // 32 keys x 32 channels at a time: pairs of keys side by side, then pairs and channels change places.
  for (std::int64_t j = 0; j < rounded; j += kDepth) {
    for (std::int64_t d = 0; d < D; d += kDepth) {
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i a = _mm512_loadu_si512(words + (j + 2 * i) * padded + d),
                      b = _mm512_loadu_si512(words + (j + 2 * i + 1) * padded + d);
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
