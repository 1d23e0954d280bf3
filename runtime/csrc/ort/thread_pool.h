// ONNX Runtime's own threads for our kernels.
#pragma once

#include <atomic>
#include <memory>

#include "../kernels/parallel.h"
#include "node.h"
#include "run.h"

namespace bdq {

// How many threads a session gives an operator. ONNX Runtime does not tell a custom operator, so the first calls count: they run
// tasks that wait for each other, and the most that ever waited at once is the number. Shared by the nodes of a session.
class ThreadCount {
 public:
  // The count of the session that `node` is created in.
  static std::shared_ptr<ThreadCount> of(const NodeInfo& node);

  int get(const Run& run);

 private:
  void measure(const Run& run);

  std::atomic<int> measured_{1};
  std::atomic<int> measurements_left_{3};
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
