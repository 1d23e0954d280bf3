// One operator on one execution provider, as ONNX Runtime sees it.
#pragma once

#include <memory>
#include <vector>

#include "../kernels/isa.h"
#include "node.h"
#include "run.h"
#include "shapes.h"

namespace bdq {

// The state of one node. compute() may run on several threads at once. Exceptions become statuses.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Run& run) const = 0;
};

using MakeKernel = std::unique_ptr<Kernel> (*)(const NodeInfo& node, Isa isa);
using InferShapes = void (*)(const ShapeInference& shapes);

// The struct of ONNX Runtime 1.18, which appended four members to that of the headers (1.17). Its version is 18.
struct OrtCustomOp18 : OrtCustomOp {
  size_t(ORT_API_CALL* GetMayInplace)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  size_t(ORT_API_CALL* GetAliasMap)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

class CustomOp final : public OrtCustomOp18 {
 public:
  // provider: "CPUExecutionProvider" or "CUDAExecutionProvider". host_inputs: bit i says that input i is wanted in host memory.
  CustomOp(const OrtApi& api, const Operator& op, const char* provider, MakeKernel make, InferShapes infer, Isa isa,
           std::uint64_t host_inputs = 0);

 private:
  static const CustomOp& of(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

  const OrtApi& api_;
  const Operator& op_;
  const char* provider_;
  MakeKernel make_;
  InferShapes infer_;
  Isa isa_;
  std::uint64_t host_inputs_;
};

using CustomOps = std::vector<std::unique_ptr<CustomOp>>;

}  // namespace bdq
