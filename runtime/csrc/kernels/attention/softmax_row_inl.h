// Softmax of one lane over one step of up to kStep keys, kWidth keys to a Vec. In the operations of vectors_*.h: included in the namespace
// of one instruction set.

// Products of a query and the codes of each key, in `weights` [kStep], to softmax weights times the scale of the value. Σ q is `total`.
// Lane n of `partial` follows; keep is what its o must be multiplied with before the weighted codes are added, offset (Σ weight z) what
// every channel must then lose.
template <int kStep>
BDQ_VECTOR void softmax_row(const Problem& problem, const StepGrids& grids, const Seen& seen, std::int64_t key, std::int64_t count,
                            float total, float* weights, const Partial& partial, std::int64_t n, float* keep, float* offset) {
  const float cap = Factors(problem.spec).cap;
  const std::int64_t begin = greater(0, seen.first - key), end = lesser(count, seen.last - key + 1);
  Vec top = set1(partial.m[n]);
  for (std::int64_t j = 0; j < kStep; j += kWidth) {
    Vec z = mul(load(grids.key_scales + j), fnma(load(grids.key_zeros + j), set1(total), load(weights + j)));
    if (cap > 0.0f) z = mul(tanh_of(z), set1(cap));
    store(weights + j, z);
    top = max(top, z);
  }
  if (begin > 0 || end < kStep) {
    for (std::int64_t j = 0; j < kStep; ++j) {
      if (j < begin || j >= end) weights[j] = -__builtin_inff();
    }
    top = set1(partial.m[n]);
    for (std::int64_t j = 0; j < kStep; j += kWidth) top = max(top, load(weights + j));
  }
  const float m = largest(top);
  Vec l = set1(0.0f), less = set1(0.0f);
  for (std::int64_t j = 0; j < kStep; j += kWidth) {
    const Vec p = exp2_of(sub(load(weights + j), set1(m)));
    const Vec weight = mul(p, load(grids.value_scales + j));
    l = add(l, p);
    less = fma(weight, load(grids.value_zeros + j), less);
    store(weights + j, weight);
  }
  alignas(64) float kept[kWidth];
  store(kept, exp2_of(set1(partial.m[n] - m)));
  *keep = kept[0];
  *offset = sum(less);
  partial.l[n] = partial.l[n] * kept[0] + sum(l);
  partial.m[n] = m;
}
