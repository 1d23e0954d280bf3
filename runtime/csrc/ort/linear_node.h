// A LowBitLinear node and its calls, the same on every provider.
#pragma once

#include "../kernels/low_bit_linear.h"
#include "node.h"
#include "run.h"

namespace bdq {

class LinearNode {
 public:
  // Throws std::invalid_argument, in one line, when attributes or constant inputs are wrong.
  explicit LinearNode(const NodeInfo& node);

  const LinearSpec& spec() const { return spec_; }
  const LinearSizes& sizes() const { return sizes_; }

  // Checks x and makes room for y. Pointers are those of the provider's memory.
  LinearArguments arguments(const Run& run) const;

 private:
  const LinearSpec spec_;
  const LinearSizes sizes_;
  const int x_;
  Constant weight_, scales_, bias_, diagonal_;
};

}  // namespace bdq
