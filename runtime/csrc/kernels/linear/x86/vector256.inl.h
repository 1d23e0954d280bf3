// 8 lanes of 32 bits. Included in the anonymous namespace of a file that has set its target.

struct Vector256 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kWidth = 8;

  static I zero() { return _mm256_setzero_si256(); }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static I all8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I all32(std::int32_t v) { return _mm256_set1_epi32(v); }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I add8(I a, I b) { return _mm256_add_epi8(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I max32(I a, I b) { return _mm256_max_epi32(a, b); }
  static I left32(I a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  // Bits `mask` of a >> n (n below 0: shifted left) of each byte; they must come from within the byte.
  template <int n> static I field(I a, int mask) { return _mm256_and_si256(shift16<n>(a), all8(mask)); }
  // (a & mask) | (b & ~mask & all)
  static I merge(I a, int mask, I b, int all) {
    return _mm256_or_si256(_mm256_and_si256(a, all8(mask)), _mm256_and_si256(b, all8(all & ~mask)));
  }
  template <int n> static I shift16(I a) {
    if constexpr (n > 0) return _mm256_srli_epi16(a, n);
    if constexpr (n < 0) return _mm256_slli_epi16(a, -n);
    return a;
  }
  template <int j> static I byte(I a) { return _mm256_and_si256(_mm256_srli_epi32(a, 8 * j), _mm256_set1_epi32(255)); }

  static F zero_f() { return _mm256_setzero_ps(); }
  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F all_f(float v) { return _mm256_set1_ps(v); }
  static F add_f(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub_f(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul_f(F a, F b) { return _mm256_mul_ps(a, b); }
  static F reciprocal(F a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
  static F max_f(F a, F b) { return _mm256_max_ps(a, b); }  // b where one is NaN
  static F min_f(F a, F b) { return _mm256_min_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F round_f(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F to_f(I a) { return _mm256_cvtepi32_ps(a); }
  static I to_i(F a) { return _mm256_cvtps_epi32(a); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F from_bits(I a) { return _mm256_castsi256_ps(a); }
  static F half(const std::uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I power_of_two_bits(I n) { return _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static std::int32_t largest(I a) {
    __m128i low = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    low = _mm_max_epi32(low, _mm_shuffle_epi32(low, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(low, _mm_shuffle_epi32(low, 0xb1)));
  }

  static void store_codes(std::int8_t* p, I a) {
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
  }

  // One stage of a Walsh-Hadamard transform within a vector: partners are h apart.
  template <int h> static F butterfly(F x) {
    F partner, sign;
    if constexpr (h == 1) partner = _mm256_permute_ps(x, 0xb1), sign = _mm256_setr_ps(0, -0.f, 0, -0.f, 0, -0.f, 0, -0.f);
    if constexpr (h == 2) partner = _mm256_permute_ps(x, 0x4e), sign = _mm256_setr_ps(0, 0, -0.f, -0.f, 0, 0, -0.f, -0.f);
    if constexpr (h == 4) partner = _mm256_permute2f128_ps(x, x, 1), sign = _mm256_setr_ps(0, 0, 0, 0, -0.f, -0.f, -0.f, -0.f);
    return _mm256_add_ps(partner, _mm256_xor_ps(x, sign));
  }
};
