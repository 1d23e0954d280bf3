#include "kv_attention.h"

#include <atomic>
#include <limits>
#include <vector>

#include "attention/append.h"
#include "attention/check.h"
#include "attention/finish.h"
#include "attention/schedule.h"
#include "linear/scratch.h"

namespace bdq {
namespace attention {
namespace {

constexpr std::int64_t kTokens = 32;        // that one thread appends at once
constexpr std::int64_t kSerialTokens = 64;  // rows (of a token and head) that are not worth a second thread
constexpr std::size_t kLine = 64;

std::size_t padded(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void write_cache(const Problem& problem, const Kernels& kernels, Parallel& parallel) {
  const AttentionArguments& a = problem.arguments;
  const std::int64_t heads = a.batch * problem.spec.kv_num_heads, parts = (a.tokens + kTokens - 1) / kTokens;
  const bool shared = a.past_key == a.present_key && a.past_value == a.present_value;
  auto work = [&](std::size_t i) {
    // Items of a head: its past, then its new tokens in parts.
    const std::int64_t head = static_cast<std::int64_t>(i) / (parts + 1), part = static_cast<std::int64_t>(i) % (parts + 1) - 1;
    const std::int64_t b = head / problem.spec.kv_num_heads, kv_head = head % problem.spec.kv_num_heads;
    if (part < 0) {
      copy_past(problem, b, kv_head);
    } else {
      append_tokens(problem, kernels, b, kv_head, part * kTokens, std::min(a.tokens, (part + 1) * kTokens));
    }
  };
  const std::size_t count = static_cast<std::size_t>(heads * (parts + 1));
  if (shared && heads * a.tokens <= kSerialTokens) {
    for (std::size_t i = 0; i < count; ++i) work(i);
  } else {
    parallel_for(parallel, count, work);
  }
}

// Memory of one partial result of `lanes` lanes.
struct PartialLayout {
  std::size_t o, m, bytes;

  PartialLayout(std::int64_t lanes, std::int64_t D)
      : o(padded(static_cast<std::size_t>(lanes * D) * sizeof(float))),
        m(padded(static_cast<std::size_t>(lanes) * sizeof(float))),
        bytes(o + 2 * m) {}

  Partial at(std::byte* memory) const {
    return {reinterpret_cast<float*>(memory), reinterpret_cast<float*>(memory + o), reinterpret_cast<float*>(memory + o + m)};
  }
};

void attend(const Problem& problem, const Kernels& kernels, const Schedule& schedule, std::byte* memory, Parallel& parallel) {
  const PartialLayout layout(schedule.lanes, problem.spec.head_size);
  const std::size_t scratch = padded(kernels.scratch_bytes(problem, schedule.lanes));
  const bool split = schedule.splits > 1;
  std::byte* partials = memory + scratch * static_cast<std::size_t>(schedule.workers);
  std::atomic<std::int64_t> next{0};
  // A partial result a worker, or where keys are split, one an item.
  auto work = [&](std::size_t worker) {
    for (std::int64_t item = next++; item < schedule.items; item = next++) {
      const Block block = schedule.block(problem, item);
      const Partial partial = layout.at(partials + layout.bytes * (split ? static_cast<std::size_t>(item) : worker));
      kernels.attend(problem, block, partial, memory + scratch * worker);
      if (!split) finish(problem, block, &partial, 1);
    }
  };
  if (schedule.workers == 1) {
    work(0);
  } else {
    parallel_for(parallel, static_cast<std::size_t>(schedule.workers), work);
  }
  if (!split) return;
  std::vector<Partial> parts(static_cast<std::size_t>(schedule.splits));
  for (std::int64_t item = 0; item < schedule.items; item += schedule.splits) {
    for (std::int64_t s = 0; s < schedule.splits; ++s)
      parts[static_cast<std::size_t>(s)] = layout.at(partials + layout.bytes * static_cast<std::size_t>(item + s));
    finish(problem, schedule.block(problem, item), parts.data(), schedule.splits);
  }
}

}  // namespace
}  // namespace attention

void kv_attention(const AttentionSpec& spec, const AttentionArguments& arguments, Isa isa, Parallel& parallel) {
  using namespace attention;
  const Problem problem(spec, arguments, isa);
  check_arguments(problem);
  const Kernels& kernels = kernels_for(isa);
  const Schedule schedule = make_schedule(problem, kernels, parallel.threads());
  const PartialLayout layout(schedule.lanes, spec.head_size);
  const std::size_t results = static_cast<std::size_t>(schedule.splits > 1 ? schedule.items : schedule.workers);
  // All memory is taken before anything is written.
  const std::size_t scratch = schedule.items > 0 ? padded(kernels.scratch_bytes(problem, schedule.lanes)) : 0;
  Scratch memory(Scratch::kAttention, scratch * static_cast<std::size_t>(schedule.workers) + layout.bytes * results);
  write_cache(problem, kernels, parallel);
  if (schedule.items > 0) attend(problem, kernels, schedule, reinterpret_cast<std::byte*>(memory.data()), parallel);
}

}  // namespace bdq
