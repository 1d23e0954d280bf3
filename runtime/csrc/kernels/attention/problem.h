// One checked call of kv_attention: the sizes and addresses that its kernels share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kv_attention.h"

namespace bdq::attention {

struct Problem {
  const AttentionSpec& spec;
  const AttentionArguments& arguments;
  Isa isa;
  std::int64_t group;               // query heads of one KV head
  std::int64_t key_row, value_row;  // bytes

  Problem(const AttentionSpec& s, const AttentionArguments& a, Isa i)
      : spec(s),
        arguments(a),
        isa(i),
        group(s.num_heads / s.kv_num_heads),
        key_row(cache_row_bytes(s.head_size, s.key_bits)),
        value_row(cache_row_bytes(s.head_size, s.value_bits)) {}

  // Tokens of row b in front of the first new one.
  std::int64_t past(std::int64_t b) const {
    if (arguments.tokens == arguments.total_sequence_length) return 0;
    return std::int64_t{arguments.seqlens_k[b]} + 1 - arguments.tokens;
  }

  std::uint8_t* present_key(std::int64_t b, std::int64_t kv_head, std::int64_t position) const {
    return arguments.present_key + ((b * spec.kv_num_heads + kv_head) * arguments.present_positions + position) * key_row;
  }
  std::uint8_t* present_value(std::int64_t b, std::int64_t kv_head, std::int64_t position) const {
    return arguments.present_value + ((b * spec.kv_num_heads + kv_head) * arguments.present_positions + position) * value_row;
  }

  // The queries that read one KV head are numbered token by token: lane = token * group + head within the group.
  std::int64_t lanes() const { return arguments.tokens * group; }
  const float* query(std::int64_t b, std::int64_t kv_head, std::int64_t lane) const {
    return arguments.query + (b * arguments.tokens + lane / group) * arguments.query_stride +
           (kv_head * group + lane % group) * spec.head_size;
  }
  float* output(std::int64_t b, std::int64_t kv_head, std::int64_t lane) const {
    return arguments.output + ((b * arguments.tokens + lane / group) * spec.num_heads + kv_head * group + lane % group) * spec.head_size;
  }

  // Keys first .. last that the token at `position` sees.
  std::int64_t first_key(std::int64_t position) const {
    const std::int64_t window = spec.local_window_size;
    return window > 0 && window <= position ? position - window + 1 : 0;
  }
};

}  // namespace bdq::attention
