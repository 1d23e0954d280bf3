#include "shapes.h"

namespace bdq {

SymbolicShape ShapeInference::input(int index) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // ONNX Runtime's: not to be released
  if (OrtStatus* status = api_.ShapeInferContext_GetInputTypeShape(&context_, static_cast<std::size_t>(index), &info)) {
    api_.ReleaseStatus(status);  // unknown rank
    return {};
  }
  std::size_t rank = 0;
  check(api_, api_.GetDimensionsCount(info, &rank));
  std::vector<std::int64_t> sizes(rank, -1);
  std::vector<const char*> names(rank, nullptr);
  if (rank > 0) {
    check(api_, api_.GetDimensions(info, sizes.data(), rank));
    check(api_, api_.GetSymbolicDimensions(info, names.data(), rank));
  }
  SymbolicShape shape(rank);
  for (std::size_t i = 0; i < rank; ++i) shape[i] = {sizes[i], names[i] == nullptr ? "" : names[i]};
  return shape;
}

std::int64_t ShapeInference::integer(const char* attribute) const {
  const OrtOpAttr* found = nullptr;
  std::int64_t value = 0;
  std::size_t read = 0;
  OrtStatus* status = api_.ShapeInferContext_GetAttribute(&context_, attribute, &found);
  if (status == nullptr) status = api_.ReadOpAttr(found, ORT_OP_ATTR_INT, &value, sizeof value, &read);
  if (status == nullptr) return value;
  api_.ReleaseStatus(status);
  return 0;
}

void ShapeInference::set_output(std::size_t index, const SymbolicShape& shape) const {
  for (const SymbolicDim& dim : shape) {
    // ONNX Runtime would take -1 for a size, in place of the one that a graph declares for its output.
    if (dim.size < 0 && dim.name.empty()) return;
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.CreateTensorTypeAndShapeInfo(&info));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api_, info};
  std::vector<std::int64_t> sizes;
  std::vector<const char*> names;
  for (const SymbolicDim& dim : shape) {
    sizes.push_back(dim.size);
    names.push_back(dim.name.c_str());
  }
  const ONNXTensorElementDataType type =
      op_.outputs[index].type == Element::kBytes ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  check(api_, api_.SetTensorElementType(info, type));
  check(api_, api_.SetDimensions(info, sizes.data(), sizes.size()));
  check(api_, api_.SetSymbolicDimensions(info, names.data(), names.size()));
  check(api_, api_.ShapeInferContext_SetOutputTypeShape(&context_, index, info));
}

}  // namespace bdq
