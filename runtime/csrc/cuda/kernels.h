// Kernels of each family for CUDAExecutionProvider.
#pragma once

#include "../ort/custom_op.h"

namespace bdq::cuda {

std::unique_ptr<Kernel> make_linear(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_attention(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_hadamard(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_fake_quantize(const NodeInfo& node, Isa isa);

}  // namespace bdq::cuda
