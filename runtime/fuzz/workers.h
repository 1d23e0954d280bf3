// Several workers one after the other: schedules for many threads, in an order that can be repeated.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace fuzz {

class ManyWorkers final : public bdq::Parallel {
 public:
  explicit ManyWorkers(int threads) : threads_(threads) {}
  int threads() const override { return threads_; }
  void run(std::size_t count, void (*work)(void*, std::size_t), void* state) override {
    for (std::size_t i = count; i > 0; --i) work(state, i - 1);
  }

 private:
  int threads_;
};

}  // namespace fuzz
