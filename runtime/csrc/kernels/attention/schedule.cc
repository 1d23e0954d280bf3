#include "schedule.h"

namespace bdq::attention {
namespace {

constexpr std::int64_t kAlign = 64;     // keys that kernels take at once
constexpr std::int64_t kMinLanes = 64;  // for which unpacking keys pays
constexpr std::int64_t kMinKeys = 128;  // of one split
constexpr std::int64_t kItemsPerThread = 4;
constexpr std::int64_t kSerialWork = 1 << 15;  // codes of keys that one thread reads sooner than it wakes another

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Schedule make_schedule(const Problem& problem, const Kernels& kernels, int threads) {
  const AttentionArguments& a = problem.arguments;
  Schedule s{};
  const std::int64_t heads = a.batch * problem.spec.kv_num_heads;
  const std::int64_t fair = ceil_div(ceil_div(heads * problem.lanes(), kItemsPerThread * threads), kMinLanes) * kMinLanes;
  s.lanes = std::min({problem.lanes(), kernels.block_lanes(problem), fair});
  if (heads == 0 || s.lanes == 0) return s;
  s.blocks = ceil_div(problem.lanes(), s.lanes);
  std::int64_t keys = a.total_sequence_length;
  if (problem.spec.local_window_size > 0) keys = std::min(keys, problem.spec.local_window_size + ceil_div(s.lanes, problem.group));
  const std::int64_t whole = heads * s.blocks;
  s.splits = 1;
  s.workers = static_cast<int>(std::min<std::int64_t>(threads, whole * ceil_div(keys, kMinKeys)));
  if (whole * keys * problem.spec.head_size < kSerialWork) s.workers = 1;
  if (s.workers > 1) {
    while (whole * s.splits < kItemsPerThread * s.workers && whole * s.splits % s.workers != 0 && keys / (s.splits + 1) >= kMinKeys)
      ++s.splits;
  }
  s.items = whole * s.splits;
  return s;
}

Block Schedule::block(const Problem& problem, std::int64_t item) const {
  const std::int64_t split = item % splits;
  item /= splits;
  const std::int64_t heads = problem.arguments.batch * problem.spec.kv_num_heads;
  Block found;
  found.batch = item % heads / problem.spec.kv_num_heads;
  found.kv_head = item % problem.spec.kv_num_heads;
  found.first = (blocks - 1 - item / heads) * lanes;
  found.count = std::min(lanes, problem.lanes() - found.first);
  const std::int64_t past = problem.past(found.batch);
  const std::int64_t begin = problem.first_key(past + found.first / problem.group);
  const std::int64_t end = past + (found.first + found.count - 1) / problem.group + 1;
  const std::int64_t origin = begin / kAlign * kAlign;
  const std::int64_t step = ceil_div(ceil_div(end - origin, splits), kAlign) * kAlign;
  found.key_begin = std::max(begin, origin + split * step);
  found.key_end = std::min(end, origin + (split + 1) * step);
  return found;
}

}  // namespace bdq::attention
