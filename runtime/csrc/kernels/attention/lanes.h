// Memory that kernels carve up, and which keys lanes see.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace bdq::attention {

constexpr std::int64_t kKeys = 64;      // keys of one step; blocks end at multiples of it, or where their last lane does
constexpr float kNothingSeen = -1e30f;  // m of a lane that saw no key: far below any logit, far above -inf
constexpr float kLog2e = 1.44269504088896340736f;

constexpr std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

// No templates of the standard library in functions of one instruction set: a copy that is not inlined could be shared with others.
constexpr std::int64_t lesser(std::int64_t a, std::int64_t b) { return b < a ? b : a; }
constexpr std::int64_t greater(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

// Hands out arrays from one piece of memory, or without one counts what they take.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(std::int64_t count) {
    T* found = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), 64));
    return found;
  }

  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

// Keys first .. last that `lane` of row `batch` sees.
struct Seen {
  std::int64_t first, last;

  Seen(const Problem& problem, std::int64_t past, std::int64_t lane)
      : first(problem.first_key(past + lane / problem.group)), last(past + lane / problem.group) {}
};

// Logits are products of the prepared query, times `query_factor`, and a key; with a softcap, tanh of them times `cap_factor`.
struct Factors {
  float query, cap;

  explicit Factors(const AttentionSpec& spec)
      : query(spec.softcap > 0.0f ? spec.scale / spec.softcap : spec.scale * kLog2e), cap(spec.softcap * kLog2e) {}
};

// Scales of the keys and values of one step, and what zero points take from their codes.
struct StepGrids {
  float *key_scales, *key_zeros, *value_scales, *value_zeros;  // one a key
};

inline StepGrids take_grids(Carver& carver, std::int64_t keys = kKeys) {
  StepGrids grids;
  grids.key_scales = carver.take<float>(keys);
  grids.key_zeros = carver.take<float>(keys);
  grids.value_scales = carver.take<float>(keys);
  grids.value_zeros = carver.take<float>(keys);
  return grids;
}

}  // namespace bdq::attention
