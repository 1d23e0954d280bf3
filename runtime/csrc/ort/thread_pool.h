// ONNX Runtime's own threads for our kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "../kernels/parallel.h"
#include "node.h"
#include "run.h"

namespace bdq {

// How many threads a session gives an operator. ONNX Runtime does not tell a custom operator, so some calls count: they run
// tasks that wait for each other, and the most that ever waited at once is the number. Shared by the nodes of a session.
// Threads that are late on a busy machine are missed, so calls go on counting, ever more seldom, until all processors were seen.
class ThreadCount {
 public:
  // The count of the session that `node` is created in.
  static std::shared_ptr<ThreadCount> of(const NodeInfo& node);

  int get(const Run& run);

 private:
  void measure(const Run& run);

  std::atomic<int> measured_{1};
  std::atomic<bool> all_seen_{false};
  std::atomic<std::uint64_t> calls_{0};
};

class ThreadPool final : public Parallel {
 public:
  ThreadPool(const Run& run, ThreadCount& count) : run_(run), threads_(count.get(run)) {}

  int threads() const override { return threads_; }
  void run(std::size_t count, void (*work)(void*, std::size_t), void* state) override;

 private:
  const Run& run_;
  int threads_;
};

}  // namespace bdq
