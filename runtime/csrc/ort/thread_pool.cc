#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace bdq {
namespace {

// Processors that this process may use: more threads than that gain nothing.
int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// Tasks wait here until all are in, or nobody new has come for a while.
struct Rendezvous {
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPatience = std::chrono::microseconds(300);

  const int expected;
  std::atomic<int> arrived{0};
  std::atomic<bool> over{false};

  void wait() {
    if (over.load()) return;
    int seen = arrived.fetch_add(1) + 1;
    auto since = Clock::now();
    while (!over.load()) {
      const int now_in = arrived.load();
      if (now_in != seen) {
        seen = now_in;
        since = Clock::now();
      }
      if (now_in >= expected || Clock::now() - since > kPatience) over.store(true);
      std::this_thread::yield();
    }
  }
};

}  // namespace

std::shared_ptr<ThreadCount> ThreadCount::of(const NodeInfo& node) {
  // Nodes of one session have one logger. The map holds no reference, so a count ends with the last kernel of its session,
  // and an address that is used again finds it gone.
  static std::mutex mutex;
  static std::map<const OrtLogger*, std::weak_ptr<ThreadCount>> counts;
  const OrtLogger* logger = nullptr;
  check(node.api(), node.api().KernelInfo_GetLogger(&node.info(), &logger));
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = counts.begin(); it != counts.end();) it = it->second.expired() ? counts.erase(it) : std::next(it);
  std::shared_ptr<ThreadCount> count = counts[logger].lock();
  if (count == nullptr) counts[logger] = count = std::make_shared<ThreadCount>();
  return count;
}

int ThreadCount::get(const Run& run) {
  if (!all_seen_.load(std::memory_order_relaxed)) {
    const std::uint64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
    if ((call & (call - 1)) == 0) measure(run);  // calls 0, 1, 2, 4, 8, ...
  }
  return measured_.load(std::memory_order_relaxed);
}

void ThreadCount::measure(const Run& run) {
  Rendezvous rendezvous{usable_processors()};
  if (rendezvous.expected > 1) {
    const auto wait = [](void* state, std::size_t) { static_cast<Rendezvous*>(state)->wait(); };
    const std::size_t tasks = static_cast<std::size_t>(rendezvous.expected);
    check(run.api(), run.api().KernelContext_ParallelFor(&run.context(), wait, tasks, 0, &rendezvous));
  }
  // A thread that came late is missed, so the largest count is kept.
  int known = measured_.load();
  const int found = std::max(1, rendezvous.arrived.load());
  while (found > known && !measured_.compare_exchange_weak(known, found)) {
  }
  if (found >= rendezvous.expected) all_seen_.store(true);
}

void ThreadPool::run(std::size_t count, void (*work)(void*, std::size_t), void* state) {
  if (threads_ == 1 || count < 2) {
    for (std::size_t i = 0; i < count; ++i) work(state, i);
    return;
  }
  check(run_.api(), run_.api().KernelContext_ParallelFor(&run_.context(), work, count, 0, state));
}

}  // namespace bdq
