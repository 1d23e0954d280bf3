// Planes of codes: eight codes at a time in the bytes of one word, on every processor.
#include <algorithm>

#include "cache_rows.h"

namespace bdq::cache_rows {
namespace {

constexpr std::uint64_t kEachByte = 0x0101010101010101u;

std::uint64_t load(const std::uint8_t* from, std::int64_t bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, from, static_cast<std::size_t>(bytes));
  return word;
}

// One plane of `width` bits, those from `shift` on: field t of byte i is channel t * bytes + i. The count of a constant 8 bytes is
// written out, since that is one instruction and any other number a call.
void pack_plane(const std::uint8_t* codes, std::uint8_t* plane, std::int64_t bytes, int shift, int width) {
  const std::uint64_t mask = kEachByte * ((1u << width) - 1);
  std::int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    std::uint64_t word = 0;
    for (int t = 0; t * width < 8; ++t) word |= (load(codes + t * bytes + i, 8) >> shift & mask) << (t * width);
    std::memcpy(plane + i, &word, 8);
  }
  if (i == bytes) return;
  std::uint64_t word = 0;
  for (int t = 0; t * width < 8; ++t) word |= (load(codes + t * bytes + i, bytes - i) >> shift & mask) << (t * width);
  std::memcpy(plane + i, &word, static_cast<std::size_t>(bytes - i));
}

// Sets the bits from `shift` on of each code, which are 0 before.
void unpack_plane(const std::uint8_t* plane, std::uint8_t* codes, std::int64_t bytes, int shift, int width, bool first) {
  const std::uint64_t mask = kEachByte * ((1u << width) - 1);
  for (int t = 0; t * width < 8; ++t) {
    std::uint8_t* to = codes + t * bytes;
    std::int64_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
      std::uint64_t word = (load(plane + i, 8) >> (t * width) & mask) << shift;
      if (!first) word |= load(to + i, 8);
      std::memcpy(to + i, &word, 8);
    }
    if (i == bytes) continue;
    std::uint64_t word = (load(plane + i, bytes - i) >> (t * width) & mask) << shift;
    if (!first) word |= load(to + i, bytes - i);
    std::memcpy(to + i, &word, static_cast<std::size_t>(bytes - i));
  }
}

}  // namespace

void pack_planes(const std::uint8_t* codes, std::uint8_t* row, std::int64_t D, int bits) {
  switch (bits) {
    case 3: pack_plane(codes, row, D / 4, 0, 2); return pack_plane(codes, row + D / 4, D / 8, 2, 1);
    case 4: return pack_plane(codes, row, D / 2, 0, 4);
    default: std::memcpy(row, codes, static_cast<std::size_t>(D));
  }
}

void unpack_planes(const std::uint8_t* row, std::uint8_t* codes, std::int64_t D, int bits) {
  switch (bits) {
    case 3: unpack_plane(row, codes, D / 4, 0, 2, true); return unpack_plane(row + D / 4, codes, D / 8, 2, 1, false);
    case 4: return unpack_plane(row, codes, D / 2, 0, 4, true);
    default: std::memcpy(codes, row, static_cast<std::size_t>(D));
  }
}

}  // namespace bdq::cache_rows
