// The table of one instruction set, in the operations of vectors_*.h: included in its namespace.

BDQ_VECTOR void rotate(const float* x, const float* cos, const float* sin, float* y, std::int64_t half) {
  std::int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, sub(mul(a, c), mul(b, s)));
    store(y + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

constexpr std::int64_t kFewLanes = kWidth;  // up to here converting codes for each lane costs less than padding lanes to a group

// As many lanes as keep queries and sums in half of the second-level cache, a quarter of a megabyte at the least.
std::int64_t block_lanes(const Problem& problem) {
  const std::int64_t lanes = (std::int64_t{1} << 17) / (problem.spec.head_size * 2 * static_cast<std::int64_t>(sizeof(float)));
  return std::max(kGroup, lanes / kGroup * kGroup);
}

std::size_t scratch_bytes(const Problem& problem, std::int64_t lanes) {
  const std::int64_t D = problem.spec.head_size;
  Carver few(nullptr), many(nullptr);
  FewLanes(few, round_up(D, kPair), std::min(lanes, kFewLanes));
  ManyLanes(many, D, lanes);
  return std::max(few.used(), many.used());
}

BDQ_VECTOR void attend(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch) {
  if (block.count <= kFewLanes) return attend_few(problem, block, partial, scratch);
  attend_many(problem, block, partial, scratch);
}

}  // namespace

const Kernels kernels = {rotate, block_lanes, scratch_bytes, attend};
