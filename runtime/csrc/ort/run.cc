#include "run.h"

namespace bdq {

Input Run::input(int index) const {
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(&context_, static_cast<std::size_t>(index), &value));
  if (value == nullptr) throw std::invalid_argument("input " + std::to_string(index) + " is missing, all are required");
  return {data_of(api_, value), dims_of(api_, value)};
}

void* Run::output(int index, const Dims& dims) const {
  OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetOutput(&context_, static_cast<std::size_t>(index), dims.sizes, dims.rank, &value));
  if (value == nullptr) throw std::invalid_argument("output " + std::to_string(index) + " is missing, all are required");
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace bdq
