// The operators for CUDAExecutionProvider, beside those for the CPU.
#include <cstdlib>
#include <string>

#include "../ort/families.h"
#include "driver.h"
#include "kernels.h"

namespace bdq {
namespace {

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

void add_cuda_ops(const OrtApi& api, CustomOps& ops) {
  // Never run on hardware by those who wrote it: off until bdq_runtime.gpu_selftest has passed on the user's GPU (docs/gpu.md).
  const bool mock = setting("BDQ_CUDA") == "mock";  // tests: the CPU provider calls them, with a driver that emulates
  if (setting("BDQ_CUDA") != "1" && !mock) return;
  if (cuda::Driver::find() == nullptr) return;
  if (mock) ops.clear();
  for (const Operator& op : operators()) {
    const auto add = [&](MakeKernel make, InferShapes infer, std::uint64_t host_inputs = 0) {
      ops.push_back(std::make_unique<CustomOp>(api, op, mock ? "CPUExecutionProvider" : "CUDAExecutionProvider", make, infer, Isa::kScalar,
                                               mock ? 0 : host_inputs));
    };
    switch (op.family) {
      case Operator::kLinear: add(cuda::make_linear, infer_linear); break;
      case Operator::kAttention:
        add(cuda::make_attention, infer_attention, std::uint64_t{3} << op.input("seqlens_k"));
        break;
      case Operator::kHadamard: add(cuda::make_hadamard, infer_same); break;
      case Operator::kFakeQuantize: add(cuda::make_fake_quantize, infer_same); break;
    }
  }
}

}  // namespace bdq
