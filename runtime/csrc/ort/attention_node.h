// A KVAttention node and its calls, the same on every provider.
#pragma once

#include "../kernels/kv_attention.h"
#include "node.h"
#include "run.h"

namespace bdq {

class AttentionNode {
 public:
  // Throws std::invalid_argument, in one line, when attributes or constant inputs are wrong.
  explicit AttentionNode(const NodeInfo& node);

  const AttentionSpec& spec() const { return spec_; }

  // Checks shapes and makes room for the outputs. seqlens_k and total_sequence_length are read here, so they are in host memory;
  // the other pointers are those of the provider's memory.
  AttentionArguments arguments(const Run& run) const;

 private:
  void read_tokens(const Run& run, AttentionArguments& arguments) const;
  void read_cache(const Run& run, AttentionArguments& arguments) const;
  void read_rotary(const Run& run, AttentionArguments& arguments) const;
  void check_rotary(const Dims& cosines, const Dims& sines) const;

  const AttentionSpec spec_;
  const bool packed_, rotary_;
  const int past_;
  std::int64_t query_size_ = 0, key_size_ = 0, key_row_ = 0, value_row_ = 0;
  Constant cos_, sin_;  // null where the graph computes them
};

}  // namespace bdq
