// 16 lanes of 32 bits. Included in the anonymous namespace of a file that has set its target.

struct Vector512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kWidth = 16;

  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I all8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I all32(std::int32_t v) { return _mm512_set1_epi32(v); }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I add8(I a, I b) { return _mm512_add_epi8(a, b); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I max32(I a, I b) { return _mm512_max_epi32(a, b); }
  static I left32(I a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Bits `mask` of a >> n (n below 0: shifted left) of each byte; they must come from within the byte.
  template <int n> static I field(I a, int mask) {
    if constexpr (n > 0) a = _mm512_srli_epi16(a, n);
    if constexpr (n < 0) a = _mm512_slli_epi16(a, -n);
    return _mm512_and_si512(a, all8(mask));
  }
  // (a & mask) | (b & ~mask & all)
  static I merge(I a, int mask, I b, int all) {
    return _mm512_and_si512(_mm512_ternarylogic_epi32(all8(mask), a, b, 0xca), all8(all));
  }
  template <int n> static I shift16(I a) {
    if constexpr (n > 0) return _mm512_srli_epi16(a, n);
    if constexpr (n < 0) return _mm512_slli_epi16(a, -n);
    return a;
  }
  template <int j> static I byte(I a) { return _mm512_and_si512(_mm512_srli_epi32(a, 8 * j), _mm512_set1_epi32(255)); }

  static F zero_f() { return _mm512_setzero_ps(); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F all_f(float v) { return _mm512_set1_ps(v); }
  static F add_f(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
  // 1 / a to 2^-23 for a in the range where it is a normal number.
  static F reciprocal(F a) {
    const F near = _mm512_rcp14_ps(a);
    return _mm512_mul_ps(near, _mm512_fnmadd_ps(a, near, _mm512_set1_ps(2.0f)));
  }
  static F max_f(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static F min_f(F a, F b) { return _mm512_min_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round_f(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F to_f(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_i(F a) { return _mm512_cvtps_epi32(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static F half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I power_of_two_bits(I n) { return _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static std::int32_t largest(I a) { return _mm512_reduce_max_epi32(a); }

  static void store_codes(std::int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

  // One stage of a Walsh-Hadamard transform within a vector: partners are h apart.
  template <int h> static F butterfly(F x) {
    F partner;
    if constexpr (h == 1) partner = _mm512_permute_ps(x, 0xb1);
    if constexpr (h == 2) partner = _mm512_permute_ps(x, 0x4e);
    if constexpr (h == 4) partner = _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (h == 8) partner = _mm512_shuffle_f32x4(x, x, 0x4e);
    constexpr __mmask16 upper = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
    const I sign = _mm512_maskz_set1_epi32(upper, static_cast<std::int32_t>(0x80000000u));
    return _mm512_add_ps(partner, _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign)));
  }
};
