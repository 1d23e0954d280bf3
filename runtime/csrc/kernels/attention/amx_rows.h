// Rows of the cache as tiles of bfloat16. A code minus its zero point is an integer that bfloat16 holds exactly; the scale of the row is
// left out, and so is what is left of a zero point beyond 0 .. 2^bits - 1 (that of a row far from 0).
#pragma once

#include "amx_tiles.h"

namespace bdq::attention::amx {

// Scales and what is left of zero points, one a key.
struct RowGrids {
  float* scales;      // [64]
  float* remainders;  // [64]: a row is (integers - remainder) * scale
  bool any_remainder;
};

// Rows up to the end of the last tile that is begun are 0.
//
// `count` rows of `row_bytes` to keys [chunks, kKeyTiles, kTile]: row j is row j % 16 of tile j / 16. scratch [chunks * 32] bytes.
void unpack_keys(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* keys,
                 RowGrids& grids, std::uint8_t* scratch);

// `count` rows to values [tiles of 16 channels, kKeyChunks, kTile]: row j is column j % 32 of chunk j / 32. words [64, chunks * 32].
void unpack_values(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* values,
                   RowGrids& grids, Half* words, std::uint8_t* scratch);

// `count` rows to values [kKeyChunks, 2 * chunks, kTile]: row r of a tile holds keys 2 r and 2 r + 1 of sixteen channels, channel_of tells
// which.
void unpack_value_pairs(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t D, int bits, std::int64_t count, Half* values,
                        RowGrids& grids, Half* words, std::uint8_t* scratch);

// Unpacking pairs takes the first four of each eight channels to one tile, the others to the next.
constexpr std::int64_t channel_of(std::int64_t tile, std::int64_t column) {
  return tile / 2 * 32 + column / 4 * 8 + tile % 2 * 4 + column % 4;
}

}  // namespace bdq::attention::amx
