#include "custom_op.h"

namespace bdq {
namespace {

ONNXTensorElementDataType element(Element type) {
  switch (type) {
    case Element::kFloat: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Element::kHalf: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Element::kBytes: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case Element::kIndex: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// Outputs that ONNX Runtime may place in the memory of an input that nobody else reads. The callback is not told for which
// operator it is called, so there is one for each map.
template <int Input, int Output, int Count>
size_t ORT_API_CALL in_place(int** inputs, int** outputs) {
  *inputs = new int[Count];
  *outputs = new int[Count];
  for (int i = 0; i < Count; ++i) {
    (*inputs)[i] = Input + i;
    (*outputs)[i] = Output + i;
  }
  return Count;
}

size_t ORT_API_CALL nothing(int** inputs, int** outputs) {
  *inputs = *outputs = nullptr;
  return 0;
}

void ORT_API_CALL release(int* inputs, int* outputs) {
  delete[] inputs;
  delete[] outputs;
}

struct NodeKernel {
  const OrtApi& api;
  std::unique_ptr<Kernel> kernel;
};

}  // namespace

CustomOp::CustomOp(const OrtApi& api, const Operator& op, const char* provider, MakeKernel make, InferShapes infer, Isa isa,
                   std::uint64_t host_inputs)
    : OrtCustomOp18{}, api_(api), op_(op), provider_(provider), make_(make), infer_(infer), isa_(isa), host_inputs_(host_inputs) {
  version = 18;
  GetName = [](const OrtCustomOp* self) { return of(self).op_.name.c_str(); };
  GetExecutionProviderType = [](const OrtCustomOp* self) { return of(self).provider_; };
  GetInputTypeCount = [](const OrtCustomOp* self) { return of(self).op_.inputs.size(); };
  GetOutputTypeCount = [](const OrtCustomOp* self) { return of(self).op_.outputs.size(); };
  GetInputType = [](const OrtCustomOp* self, size_t i) { return element(of(self).op_.inputs[i].type); };
  GetOutputType = [](const OrtCustomOp* self, size_t i) { return element(of(self).op_.outputs[i].type); };
  GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetInputMemoryType = [](const OrtCustomOp* self, size_t i) {
    return of(self).host_inputs_ >> i & 1 ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetStartVersion = [](const OrtCustomOp*) { return kFirstOpsetVersion; };
  GetEndVersion = [](const OrtCustomOp*) { return kOpsetVersion; };
  GetAliasMap = nothing;
  ReleaseMayInplace = ReleaseAliasMap = release;
  const int past = op.input("past_key");
  GetMayInplace = op.family == Operator::kLinear      ? nothing
                  : op.family != Operator::kAttention ? in_place<0, 0, 1>
                  : past == 1                         ? in_place<1, 1, 2>
                                                      : in_place<3, 1, 2>;
  CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatusPtr {
    const CustomOp& op = of(self);
    return guarded(*api, [&] {
      const NodeInfo node(*api, *info, op.op_);
      try {
        *kernel = new NodeKernel{*api, op.make_(node, op.isa_)};
      } catch (const std::exception& error) {
        throw std::invalid_argument(node.label() + ": " + error.what());
      }
    });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<NodeKernel*>(kernel); };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
    const NodeKernel& node = *static_cast<const NodeKernel*>(kernel);
    return guarded(node.api, [&] { node.kernel->compute(Run(node.api, *context)); });
  };
  InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) -> OrtStatusPtr {
    const CustomOp& op = of(self);
    return guarded(op.api_, [&] { op.infer_(ShapeInference(op.api_, *context, op.op_)); });
  };
}

}  // namespace bdq
