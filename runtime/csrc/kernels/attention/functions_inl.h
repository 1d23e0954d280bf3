// Functions in the operations of vectors_*.h: included in the namespace of one instruction set.

// tanh x to a few roundings: an odd polynomial (that of Cephes) for small x, else 1 - 2 / (e^2|x| + 1).
BDQ_INLINE Vec tanh_of(Vec x) {
  const Vec square = mul(x, x), size = absolute(x);
  Vec y = set1(-5.70498872745e-3f);
  y = fma(y, square, set1(2.06390887954e-2f));
  y = fma(y, square, set1(-5.37397155531e-2f));
  y = fma(y, square, set1(1.33314422036e-1f));
  y = fma(y, square, set1(-3.33332819422e-1f));
  y = fma(mul(y, square), x, x);
  const Vec power = exp2_of(min(mul(size, set1(2.88539008f)), set1(60.0f)));  // e^2|x|
  const Vec large = sub(set1(1.0f), div(set1(2.0f), add(power, set1(1.0f))));
  return select_less(size, set1(0.625f), y, with_sign_of(large, x));
}

// Multiplies count numbers, a multiple of kWidth, and returns the sum of the products.
BDQ_INLINE float scale_row(float* x, std::int64_t count, float factor) {
  Vec total = set1(0.0f);
  for (std::int64_t d = 0; d < count; d += kWidth) {
    const Vec y = mul(load(x + d), set1(factor));
    total = add(total, y);
    store(x + d, y);
  }
  return sum(total);
}
