// KVAttention and its variants on the CPU: docs/ops.md, "Quantized-KV attention".
#include "attention_node.h"
#include "families.h"
#include "thread_pool.h"

namespace bdq {
namespace {

class Attention final : public Kernel {
 public:
  Attention(const NodeInfo& node, Isa isa) : node_(node), isa_(isa), threads_(ThreadCount::of(node)) {}

  void compute(const Run& run) const override {
    const AttentionArguments arguments = node_.arguments(run);
    if (arguments.batch == 0) return;
    ThreadPool pool(run, *threads_);
    kv_attention(node_.spec(), arguments, isa_, pool);
  }

 private:
  const AttentionNode node_;
  const Isa isa_;
  const std::shared_ptr<ThreadCount> threads_;
};

}  // namespace

std::unique_ptr<Kernel> make_attention(const NodeInfo& node, Isa isa) { return std::make_unique<Attention>(node, isa); }

void infer_attention(const ShapeInference& shapes) {
  SymbolicShape output = shapes.input(0)  /* query or qkv */;
  const std::int64_t heads = shapes.integer("num_heads"), size = shapes.integer("head_size"), limit = std::int64_t{1} << 31;
  if (output.size() == 3 && heads > 0 && heads < limit && size > 0 && size < limit) {
    output.back() = {heads * size, ""};
    shapes.set_output(0, output);
  }
  std::size_t index = 1;
  for (const char* past : {"past_key", "past_value"}) {
    SymbolicShape present = shapes.input(past);
    if (present.size() == 4) {
      present[2] = {};  // past, or the text when that is longer
      shapes.set_output(index, present);
    }
    ++index;
  }
}

}  // namespace bdq
