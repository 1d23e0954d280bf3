// LowBitLinear and its variants on the CPU: docs/ops.md, "Linear operators".
#include "families.h"
#include "linear_node.h"
#include "thread_pool.h"

namespace bdq {
namespace {

class Linear final : public Kernel {
 public:
  Linear(const NodeInfo& node, Isa isa) : node_(node), isa_(isa), threads_(ThreadCount::of(node)) {}

  void compute(const Run& run) const override {
    const LinearArguments arguments = node_.arguments(run);
    if (arguments.M == 0) return;
    ThreadPool pool(run, *threads_);
    low_bit_linear(node_.spec(), arguments, isa_, pool);
  }

 private:
  const LinearNode node_;
  const Isa isa_;
  const std::shared_ptr<ThreadCount> threads_;
};

}  // namespace

std::unique_ptr<Kernel> make_linear(const NodeInfo& node, Isa isa) { return std::make_unique<Linear>(node, isa); }

void infer_linear(const ShapeInference& shapes) {
  SymbolicShape y = shapes.input("x");
  const std::int64_t n = shapes.integer("N");
  if (y.empty() || n <= 0) return;
  y.back() = {n, ""};
  shapes.set_output(0, y);
}

}  // namespace bdq
