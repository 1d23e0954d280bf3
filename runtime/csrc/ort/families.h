// The operators of each family: CPU kernels, and the shapes of their outputs on any provider.
#pragma once

#include "custom_op.h"

namespace bdq {

std::unique_ptr<Kernel> make_linear(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_attention(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_hadamard(const NodeInfo& node, Isa isa);
std::unique_ptr<Kernel> make_fake_quantize(const NodeInfo& node, Isa isa);

void infer_linear(const ShapeInference& shapes);
void infer_attention(const ShapeInference& shapes);
void infer_same(const ShapeInference& shapes);  // Hadamard, DynamicFakeQuantize

// Kernels of every operator for the CPU.
void add_cpu_ops(const OrtApi& api, Isa isa, CustomOps& ops);

// Kernels for CUDAExecutionProvider (csrc/cuda), of operators that have a CPU kernel too: a schema without one would keep CPU
// sessions from falling back to the function body. Adds none where they cannot run (no driver).
void add_cuda_ops(const OrtApi& api, CustomOps& ops);

}  // namespace bdq
