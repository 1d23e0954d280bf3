// Attention over a quantized KV cache: docs/ops.md, "Quantized-KV attention". No ONNX Runtime in here.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace bdq {

struct AttentionSpec {
  std::int64_t num_heads = 0;
  std::int64_t kv_num_heads = 0;
  std::int64_t head_size = 0;
  int key_bits = 4;
  int value_bits = 4;
  float key_clip = 1.0f;
  float value_clip = 1.0f;
  bool hadamard = false;
  float scale = 1.0f;
  float softcap = 0.0f;               // 0: none
  std::int64_t local_window_size = -1;  // not positive: none
};

struct AttentionArguments {
  // Rows of one token: head h of `query` starts at query + token * query_stride + h * head_size; so for key and value. A packed qkv
  // is three pointers into one tensor.
  const float* query = nullptr;
  const float* key = nullptr;
  const float* value = nullptr;
  std::int64_t query_stride = 0, key_stride = 0, value_stride = 0;
  std::int64_t batch = 0;
  std::int64_t tokens = 0;                         // S
  const std::int32_t* seqlens_k = nullptr;         // [batch]
  std::int64_t total_sequence_length = 0;
  const float* cos_cache = nullptr;                // [positions, rotary_dim / 2], or null
  const float* sin_cache = nullptr;
  std::int64_t positions = 0, rotary_dim = 0;
  const std::uint8_t* past_key = nullptr;          // [batch, kv_num_heads, past_positions, row]
  const std::uint8_t* past_value = nullptr;
  std::int64_t past_positions = 0;
  std::uint8_t* present_key = nullptr;             // [batch, kv_num_heads, present_positions, row]; may be past
  std::uint8_t* present_value = nullptr;
  std::int64_t present_positions = 0;
  float* output = nullptr;                         // [batch, S, num_heads * head_size]
};

std::int64_t cache_row_bytes(std::int64_t head_size, int bits);

// Throws std::invalid_argument, in one line, for a spec that no operator may have.
void check_attention(const AttentionSpec& spec);

// Throws std::invalid_argument when run-time values contradict each other or the sizes (seqlens_k below 0 or beyond the cache, positions
// beyond cos_cache, ...), before anything is written.
void kv_attention(const AttentionSpec& spec, const AttentionArguments& arguments, Isa isa, Parallel& parallel);

}  // namespace bdq
