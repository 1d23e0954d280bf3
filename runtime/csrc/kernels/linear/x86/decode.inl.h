// From the bits of a panel to bytes. Included in the anonymous namespace of a file that has set its target.
//
// A step is 32 columns: 8 quads of four columns, each a vector whose 32-bit lanes are output channels.

constexpr std::int64_t kStep = 32;

// Bytes of one panel for step s start at `panel` + what these say; at 3 bits those of the high plane, too.
template <int bits> inline const std::uint8_t* step_bytes(const std::uint8_t* panel, std::int64_t s) {
  if constexpr (bits == 3) return panel + s / 2 * 384 + s % 2 * 128;
  return panel + s * 64 * bits;
}
inline const std::uint8_t* step_high_bytes(const std::uint8_t* panel, std::int64_t s) {
  return panel + s / 2 * 384 + 256 + s % 2 * 64;
}

// Codes of step s; `panel` is moved by 32 bytes for the upper lanes of 256-bit vectors.
template <class V, int bits> BDQ_INLINE inline void decode(const std::uint8_t* panel, std::int64_t s, typename V::I (&w)[8]) {
  const std::uint8_t* p = step_bytes<bits>(panel, s);
  if constexpr (bits == 8) {
    each<8>([&](auto i) BDQ_INLINE { w[i.value] = V::load(p + 64 * i.value); });
  } else if constexpr (bits == 4) {
    each<4>([&](auto i) BDQ_INLINE {
      const auto b = V::load(p + 64 * i.value);
      w[2 * i.value] = V::template field<0>(b, 15);
      w[2 * i.value + 1] = V::template field<4>(b, 15);
    });
  } else if constexpr (bits == 2) {
    each<2>([&](auto i) BDQ_INLINE {
      const auto b = V::load(p + 64 * i.value);
      each<4>([&](auto t) BDQ_INLINE { w[4 * i.value + t.value] = V::template field<2 * t.value>(b, 3); });
    });
  } else {
    const auto high = V::load(step_high_bytes(panel, s)), low0 = V::load(p), low1 = V::load(p + 64);
    w[0] = V::merge(low0, 3, V::template shift16<-2>(high), 7);
    w[1] = V::merge(V::template shift16<2>(low0), 3, V::template shift16<-1>(high), 7);
    w[2] = V::merge(V::template shift16<4>(low0), 3, high, 7);
    w[3] = V::merge(V::template shift16<6>(low0), 3, V::template shift16<1>(high), 7);
    w[4] = V::merge(low1, 3, V::template shift16<2>(high), 7);
    w[5] = V::merge(V::template shift16<2>(low1), 3, V::template shift16<3>(high), 7);
    w[6] = V::merge(V::template shift16<4>(low1), 3, V::template shift16<4>(high), 7);
    w[7] = V::merge(V::template shift16<6>(low1), 3, V::template shift16<5>(high), 7);
  }
}
