// vpdpbusd on 512 bits. Included in the anonymous namespace of a file that has set its target.

struct VnniDot {
  static constexpr bool kPairs = false;  // D::add_pairs and D::widened: sums of two products, in 16 bits
  template <bool wide> static __m512i dot(__m512i acc, __m512i w, __m512i a) { return _mm512_dpbusd_epi32(acc, w, a); }
  template <int bits> BDQ_INLINE static void dot8(__m512i& acc, __m512i& other, const __m512i (&w)[8], const std::int8_t* a) {
    each<8>([&](auto i) BDQ_INLINE {
      std::int32_t four;
      __builtin_memcpy(&four, a + 4 * i.value, 4);
      __m512i& to = i.value % 2 == 0 ? acc : other;
      to = _mm512_dpbusd_epi32(to, w[i.value], _mm512_set1_epi32(four));
    });
  }
};
