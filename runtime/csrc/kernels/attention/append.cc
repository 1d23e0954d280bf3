#include "append.h"

#include <cstring>

#include "../rows.h"

namespace bdq::attention {
namespace {

constexpr std::int64_t kMaxHeadSize = 4096;  // check_attention

// One head of keys or values: [past_positions, row] to [present_positions, row], except for positions skip .. skip_end - 1.
void copy_rows(const std::uint8_t* past, std::int64_t past_positions, std::uint8_t* present, std::int64_t present_positions,
               std::int64_t row, std::int64_t skip, std::int64_t skip_end) {
  auto copy = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t kept = std::min(end, past_positions);
    if (begin < kept) std::memcpy(present + begin * row, past + begin * row, static_cast<std::size_t>((kept - begin) * row));
    const std::int64_t zero = std::max(begin, past_positions);
    if (zero < end) std::memset(present + zero * row, 0, static_cast<std::size_t>((end - zero) * row));
  };
  copy(0, skip);
  copy(skip_end, present_positions);
}

}  // namespace

void copy_past(const Problem& problem, std::int64_t b, std::int64_t kv_head) {
  const AttentionArguments& a = problem.arguments;
  const std::int64_t head = b * problem.spec.kv_num_heads + kv_head, skip = problem.past(b), skip_end = skip + a.tokens;
  if (a.past_key != a.present_key) {
    const std::int64_t row = problem.key_row;
    copy_rows(a.past_positions > 0 ? a.past_key + head * a.past_positions * row : nullptr, a.past_positions,
              problem.present_key(b, kv_head, 0), a.present_positions, row, skip, skip_end);
  }
  if (a.past_value != a.present_value) {
    const std::int64_t row = problem.value_row;
    copy_rows(a.past_positions > 0 ? a.past_value + head * a.past_positions * row : nullptr, a.past_positions,
              problem.present_value(b, kv_head, 0), a.present_positions, row, skip, skip_end);
  }
}

void append_tokens(const Problem& problem, const Kernels& kernels, std::int64_t b, std::int64_t kv_head, std::int64_t first,
                   std::int64_t last) {
  const AttentionSpec& spec = problem.spec;
  const AttentionArguments& a = problem.arguments;
  const std::int64_t D = spec.head_size, past = problem.past(b);
  alignas(64) float head[kMaxHeadSize];
  for (std::int64_t token = first; token < last; ++token) {
    const std::int64_t row = b * a.tokens + token, position = past + token;
    prepare_head(problem, kernels, a.key + row * a.key_stride + kv_head * D, position, head);
    quantize_cache_row(head, problem.present_key(b, kv_head, position), D, spec.key_bits, spec.key_clip, problem.isa);
    quantize_cache_row(a.value + row * a.value_stride + kv_head * D, problem.present_value(b, kv_head, position), D, spec.value_bits,
                       spec.value_clip, problem.isa);
  }
}

}  // namespace bdq::attention
