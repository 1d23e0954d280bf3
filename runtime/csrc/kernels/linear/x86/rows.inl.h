// Hadamard and quantization of one row. Included in the anonymous namespace of a file that has set its target.

template <class V> float largest_magnitude(const float* x, std::int64_t K) {
  using I = typename V::I;
  const I magnitude = V::all32(0x7fffffff);
  I most[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  std::int64_t k = 0;
  for (; k + 4 * V::kWidth <= K; k += 4 * V::kWidth) {
    for (int i = 0; i < 4; ++i) {
      most[i] = V::max32(most[i], V::both(V::load(x + k + i * V::kWidth), magnitude));
      _mm_prefetch(reinterpret_cast<const char*>(x + k + i * V::kWidth + K), _MM_HINT_T0);  // the next row
    }
  }
  for (; k + V::kWidth <= K; k += V::kWidth) most[0] = V::max32(most[0], V::both(V::load(x + k), magnitude));
  if (k < K) {
    float rest[V::kWidth] = {};
    __builtin_memcpy(rest, x + k, static_cast<std::size_t>(K - k) * sizeof(float));
    most[0] = V::max32(most[0], V::both(V::load(rest), magnitude));
  }
  const std::int32_t bits = V::largest(V::max32(V::max32(most[0], most[1]), V::max32(most[2], most[3])));
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// A NaN stays one.
inline float at_least(float value, float floor) { return value < floor ? floor : value; }

// Codes of 64 floats at p.
template <class V> inline void quantize_chunk(const float* x, typename V::F inverse, typename V::F low, typename V::F high,
                                              std::int8_t* p) {
  for (int i = 0; i < kChunk; i += V::kWidth) {
    const auto scaled = V::mul_f(V::load_f(x + i), inverse);
    V::store_codes(p + i, V::to_i(V::min_f(V::max_f(scaled, low), high)));
  }
}

inline std::int32_t total(__m256i a) {
  __m128i low = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  low = _mm_add_epi32(low, _mm_shuffle_epi32(low, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(low, _mm_shuffle_epi32(low, 0xb1)));
}

inline __m256i add_32_codes(__m256i sum, const std::int8_t* p) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline void sum_codes(const RowTarget& to, std::int64_t padded_K) {
  const std::int64_t steps = (padded_K + 31) / 32, each = (to.sum_columns + 31) / 32;
  std::int64_t step = 0;
  for (std::int64_t b = 0; b < to.sum_count; ++b) {
    __m256i sum = _mm256_setzero_si256();
    const std::int64_t end = (b + 1) * each < steps ? (b + 1) * each : steps;
    for (; step < end; ++step) sum = add_32_codes(sum, to.codes + step / 2 * to.chunk_stride + step % 2 * 32);
    to.sums[b] = total(sum);
  }
}

template <class V>
float quantize_row_into(const float* x, std::int64_t K, std::int64_t padded_K, int bits, float clip, const RowTarget& to) {
  const float highest = static_cast<float>((1 << (bits - 1)) - 1);
  const float scale = at_least(largest_magnitude<V>(x, K) * (clip / highest), 1e-30f);
  const auto inverse = V::all_f(1.0f / scale), low = V::all_f(-highest - 1.0f), high = V::all_f(highest);
  const std::int64_t whole = K / kChunk;
  for (std::int64_t c = 0; c < whole; ++c) quantize_chunk<V>(x + c * kChunk, inverse, low, high, to.codes + c * to.chunk_stride);
  for (std::int64_t c = whole; c * kChunk < padded_K; ++c) {
    alignas(64) float rest[kChunk] = {};
    alignas(64) std::int8_t codes[kChunk];
    if (c * kChunk < K) __builtin_memcpy(rest, x + c * kChunk, static_cast<std::size_t>(K - c * kChunk) * sizeof(float));
    quantize_chunk<V>(rest, inverse, low, high, codes);
    const std::int64_t left = padded_K - c * kChunk;
    __builtin_memcpy(to.codes + c * to.chunk_stride, codes, static_cast<std::size_t>(left < kChunk ? left : kChunk));
  }
  if (padded_K % 32 == 0) {
    sum_codes(to, padded_K);
  } else {  // rows of the public function may end anywhere; they have one sum
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < K; ++k) sum += to.codes[k / kChunk * to.chunk_stride + k % kChunk];
    to.sums[0] = sum;
  }
  return scale;
}

template <class V> inline typename V::F butterflies(typename V::F v, int size) {
  if (size > 1) v = V::template butterfly<1>(v);
  if (size > 2) v = V::template butterfly<2>(v);
  if (size > 4) v = V::template butterfly<4>(v);
  if constexpr (V::kWidth == 16) {
    if (size > 8) v = V::template butterfly<8>(v);
  }
  return v;
}

// Two stages at once, partners `half` and 2 * half apart, over `size` floats.
template <class V> inline void radix4(float* y, std::int64_t size, std::int64_t half) {
  for (std::int64_t i = 0; i < size; i += 4 * half) {
    for (std::int64_t j = i; j < i + half; j += V::kWidth) {
      const auto a = V::load_f(y + j), b = V::load_f(y + j + half);
      const auto c = V::load_f(y + j + 2 * half), d = V::load_f(y + j + 3 * half);
      const auto ab = V::add_f(a, b), a_b = V::sub_f(a, b), cd = V::add_f(c, d), c_d = V::sub_f(c, d);
      V::store_f(y + j, V::add_f(ab, cd));
      V::store_f(y + j + half, V::add_f(a_b, c_d));
      V::store_f(y + j + 2 * half, V::sub_f(ab, cd));
      V::store_f(y + j + 3 * half, V::sub_f(a_b, c_d));
    }
  }
}

template <class V> inline void radix2(float* y, std::int64_t size, std::int64_t half) {
  for (std::int64_t i = 0; i < size; i += 2 * half) {
    for (std::int64_t j = i; j < i + half; j += V::kWidth) {
      const auto a = V::load_f(y + j), b = V::load_f(y + j + half);
      V::store_f(y + j, V::add_f(a, b));
      V::store_f(y + j + half, V::sub_f(a, b));
    }
  }
}

template <class V> void hadamard_into(const float* x, const float* diagonal, float* y, std::int64_t K, int size) {
  const int log2 = __builtin_ctz(static_cast<unsigned>(size));
  const int rank = 24 - log2 < 20 ? 24 - log2 : 20;
  const float step = at_least(largest_magnitude<V>(x, K) * (1.0f / static_cast<float>(1 << rank)), 1e-30f);
  const auto inverse = V::all_f(1.0f / step);
  const auto back = V::all_f(step * static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(size))));
  // + 0: no -0, whose sign would depend on the order
  const auto first = [&](const float* from) {
    return butterflies<V>(V::add_f(V::round_f(V::mul_f(V::load_f(from), inverse)), V::zero_f()), size);
  };
  std::int64_t k = 0;
  for (; k + V::kWidth <= K; k += V::kWidth) V::store_f(y + k, first(x + k));
  float rest[V::kWidth] = {};
  const std::size_t rest_bytes = static_cast<std::size_t>(K - k) * sizeof(float);
  if (k < K) {  // the blocks are shorter than a vector
    __builtin_memcpy(rest, x + k, rest_bytes);
    V::store_f(rest, V::mul_f(first(rest), back));
    if (diagonal != nullptr) {
      float factors[V::kWidth] = {};
      __builtin_memcpy(factors, diagonal + k, rest_bytes);
      V::store_f(rest, V::mul_f(V::load_f(rest), V::load_f(factors)));
    }
    __builtin_memcpy(y + k, rest, rest_bytes);
  }
  for (std::int64_t start = 0; size > V::kWidth && start < K; start += size) {
    std::int64_t half = V::kWidth;
    for (; 4 * half <= size; half *= 4) radix4<V>(y + start, size, half);
    if (half < size) radix2<V>(y + start, size, half);
  }
  for (std::int64_t j = 0; j < k; j += V::kWidth) {
    auto v = V::mul_f(V::load_f(y + j), back);
    if (diagonal != nullptr) v = V::mul_f(v, V::load_f(diagonal + j));
    V::store_f(y + j, v);
  }
}
