#include "check.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace bdq {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("KVAttention: " + message); }

std::string text(std::int64_t value) { return std::to_string(value); }

// Far above any model, far below where a product of two sizes overflows.
constexpr std::int64_t kMaxHeads = 1 << 16;
constexpr std::int64_t kMaxHeadSize = 4096;

void check_bits(const char* name, int bits) {
  if (bits != 3 && bits != 4 && bits != 8) refuse(std::string(name) + " is " + text(bits) + ", expected 3, 4 or 8");
}

void check_clip(const char* name, float clip) {
  if (!(clip > 0.0f) || !std::isfinite(clip)) refuse(std::string(name) + " is " + std::to_string(clip) + ", expected a positive number");
}

bool overlap(const std::uint8_t* a, std::int64_t a_bytes, const std::uint8_t* b, std::int64_t b_bytes) {
  const auto x = reinterpret_cast<std::uintptr_t>(a), y = reinterpret_cast<std::uintptr_t>(b);
  return a_bytes > 0 && b_bytes > 0 && x < y + static_cast<std::uintptr_t>(b_bytes) && y < x + static_cast<std::uintptr_t>(a_bytes);
}

}  // namespace

std::int64_t cache_row_bytes(std::int64_t head_size, int bits) { return head_size * bits / 8 + 4; }

void check_attention(const AttentionSpec& spec) {
  if (spec.num_heads < 1 || spec.num_heads > kMaxHeads)
    refuse("num_heads is " + text(spec.num_heads) + ", expected 1 to " + text(kMaxHeads));
  if (spec.kv_num_heads < 1 || spec.num_heads % spec.kv_num_heads != 0)
    refuse("kv_num_heads is " + text(spec.kv_num_heads) + ", expected a divisor of num_heads = " + text(spec.num_heads));
  if (spec.head_size < 8 || spec.head_size > kMaxHeadSize || spec.head_size % 8 != 0)
    refuse("head_size is " + text(spec.head_size) + ", expected a multiple of 8 from 8 to " + text(kMaxHeadSize));
  if (spec.hadamard && (spec.head_size & (spec.head_size - 1)) != 0)
    refuse("head_size is " + text(spec.head_size) + ", expected a power of two with hadamard = 1");
  check_bits("key_bits", spec.key_bits);
  check_bits("value_bits", spec.value_bits);
  check_clip("key_clip", spec.key_clip);
  check_clip("value_clip", spec.value_clip);
  if (!(spec.scale > 0.0f) || !std::isfinite(spec.scale)) refuse("scale is " + std::to_string(spec.scale) + ", expected a positive number");
  if (!(spec.softcap >= 0.0f) || !std::isfinite(spec.softcap))
    refuse("softcap is " + std::to_string(spec.softcap) + ", expected 0 (none) or a positive number");
}

namespace attention {
namespace {

void check_cache(const char* name, const Problem& p, const std::uint8_t* past, const std::uint8_t* present, std::int64_t row) {
  const AttentionArguments& a = p.arguments;
  const std::int64_t heads = a.batch * p.spec.kv_num_heads;
  if (past == present && a.past_positions != a.present_positions)
    refuse(std::string("past and present ") + name + " share memory but have " + text(a.past_positions) + " and " +
           text(a.present_positions) + " positions, expected the same number");
  if (past != present && overlap(past, heads * a.past_positions * row, present, heads * a.present_positions * row))
    refuse(std::string("past and present ") + name + " overlap in part, expected the same memory or none in common");
}

void check_row(const Problem& p, std::int64_t b) {
  const AttentionArguments& a = p.arguments;
  const std::string row = "seqlens_k[" + text(b) + "]";
  const std::int64_t length = std::int64_t{a.seqlens_k[b]} + 1;
  if (length < 1 || length > a.total_sequence_length)
    refuse(row + " is " + text(length - 1) + ", expected 0 to total_sequence_length - 1 = " + text(a.total_sequence_length - 1));
  const std::int64_t past = p.past(b);
  if (past < 0) refuse(row + " is " + text(length - 1) + ", expected at least the number of new tokens - 1 = " + text(a.tokens - 1));
  if (past > a.past_positions)
    refuse(row + " means " + text(past) + " past tokens, expected at most the positions of past = " + text(a.past_positions));
  if (a.cos_cache != nullptr && past + a.tokens > a.positions)
    refuse(row + " means a token at position " + text(past + a.tokens - 1) +
           ", expected less than the rows of cos_cache = " + text(a.positions));
}

}  // namespace

void check_arguments(const Problem& p) {
  const AttentionArguments& a = p.arguments;
  if (a.batch < 0 || a.tokens < 0) refuse("the query is of " + text(a.batch) + " rows of " + text(a.tokens) + " tokens");
  if (a.total_sequence_length < a.tokens)
    refuse("total_sequence_length is " + text(a.total_sequence_length) +
           ", expected at least the number of new tokens = " + text(a.tokens));
  const std::int64_t positions = std::max(a.past_positions, a.total_sequence_length);
  if (a.present_positions != positions)
    refuse("present has " + text(a.present_positions) + " positions, expected max(past, total_sequence_length) = " + text(positions));
  if ((a.cos_cache == nullptr) != (a.sin_cache == nullptr)) refuse("cos_cache and sin_cache go together");
  if (a.cos_cache != nullptr && (a.rotary_dim < 2 || a.rotary_dim % 2 != 0 || a.rotary_dim > p.spec.head_size))
    refuse("cos_cache turns " + text(a.rotary_dim) + " channels, expected 2 to head_size = " + text(p.spec.head_size));
  check_cache("key", p, a.past_key, a.present_key, p.key_row);
  check_cache("value", p, a.past_value, a.present_value, p.value_row);
  for (std::int64_t b = 0; b < a.batch; ++b) check_row(p, b);
}

}  // namespace attention
}  // namespace bdq
