#include "api.h"

namespace bdq {

std::string text(const Dims& dims) {
  std::string s = "[";
  for (std::size_t i = 0; i < dims.rank; ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + "]";
}

Dims dims_of(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info) {
  Dims dims;
  check(api, api.GetDimensionsCount(info, &dims.rank));
  if (dims.rank > Dims::kMaxRank)
    throw std::invalid_argument("a tensor has " + std::to_string(dims.rank) + " dimensions, expected at most 8");
  check(api, api.GetDimensions(info, dims.sizes, dims.rank));
  return dims;
}

Dims dims_of(const OrtApi& api, const OrtValue* tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(tensor, &info));
  struct Release {
    const OrtApi& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Release() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } release{api, info};
  return dims_of(api, info);
}

const void* data_of(const OrtApi& api, const OrtValue* tensor) {
  void* data = nullptr;
  // The C API has no const variant; nothing is written through it.
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(tensor), &data));
  return data;
}

}  // namespace bdq
