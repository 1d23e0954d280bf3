// How a kernel runs work on several threads without knowing whose threads they are.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>
#include <type_traits>

namespace bdq {

class Parallel {
 public:
  virtual ~Parallel() = default;

  // Threads that can run at once, the caller's included.
  virtual int threads() const = 0;

  // Calls work(state, i) once for each i below count, in any order, on any thread; returns when all are done.
  virtual void run(std::size_t count, void (*work)(void* state, std::size_t i), void* state) = 0;
};

// Runs everything on the calling thread.
class Serial final : public Parallel {
 public:
  int threads() const override { return 1; }
  void run(std::size_t count, void (*work)(void*, std::size_t), void* state) override {
    for (std::size_t i = 0; i < count; ++i) work(state, i);
  }
};

// parallel_for(parallel, n, [&](std::size_t i) { ... }) without std::function.
template <class Work>
void parallel_for(Parallel& parallel, std::size_t count, Work&& work) {
  parallel.run(count, [](void* state, std::size_t i) { (*static_cast<std::remove_reference_t<Work>*>(state))(i); }, &work);
}

// The same for work that allocates: an exception must not leave through threads that are not ours, so it waits until all are done.
template <class Work>
void parallel_for_allocating(Parallel& parallel, std::size_t count, Work&& work) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(parallel, count, [&](std::size_t i) {
    try {
      work(i);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace bdq
