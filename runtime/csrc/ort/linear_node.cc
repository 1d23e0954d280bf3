#include "linear_node.h"

namespace bdq {
namespace {

LinearSpec spec_of(const NodeInfo& node) {
  LinearSpec spec;
  spec.K = node.integer("K");
  spec.N = node.integer("N");
  spec.weight_bits = node.small_integer("weight_bits");
  spec.odd_grid = node.flag("weight_grid");
  spec.block_size = node.integer("block_size");
  spec.activation_bits = node.small_integer("activation_bits");
  spec.activation_clip = node.number("activation_clip");
  if (node.has_input("diagonal")) {
    spec.hadamard_size = node.small_integer("hadamard_size");
    if (spec.hadamard_size < 1) throw std::invalid_argument("attribute hadamard_size is not positive");
    spec.hadamard_interleave = node.small_integer("hadamard_interleave");
  }
  if (node.op().attribute("gate") != nullptr) {
    const std::string gate = node.text("gate");
    if (gate != "silu" && gate != "gelu_tanh")
      throw std::invalid_argument("attribute gate is '" + gate + "', expected silu or gelu_tanh");
    spec.gate = gate == "silu" ? Gate::kSilu : Gate::kGeluTanh;
  }
  return spec;
}

}  // namespace

LinearNode::LinearNode(const NodeInfo& node) : spec_(spec_of(node)), sizes_(check_linear(spec_)), x_(node.op().input("x")) {
  weight_ = node.constant("weight", {sizes_.panels, sizes_.chunks, 128 * static_cast<std::int64_t>(spec_.weight_bits)});
  scales_ = node.constant("scales", {sizes_.panels, sizes_.blocks, 16});
  if (node.has_input("bias")) bias_ = node.constant("bias", {spec_.gate == Gate::kNone ? spec_.N : 2 * spec_.N});
  if (node.has_input("diagonal")) diagonal_ = node.constant("diagonal", {spec_.K});
  node.check_last_dimension("x", spec_.K);
}

LinearArguments LinearNode::arguments(const Run& run) const {
  const Input x = run.input(x_);
  if (x.dims.rank == 0 || x.dims.back() != spec_.K)
    throw std::invalid_argument("x is " + text(x.dims) + ", expected " + std::to_string(spec_.K) + " in the last dimension");
  Dims y = x.dims;
  y.back() = spec_.N;
  LinearArguments arguments;
  arguments.x = x.as<float>();
  arguments.diagonal = diagonal_.as<float>();
  arguments.weight = weight_.as<std::uint8_t>();
  arguments.scales = scales_.as<std::uint16_t>();
  arguments.bias = bias_.as<float>();
  arguments.y = run.output<float>(0, y);
  arguments.M = x.dims.count() / spec_.K;
  return arguments;
}

}  // namespace bdq
