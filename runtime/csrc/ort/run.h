// One call of a kernel: its tensors. Nothing here allocates but ONNX Runtime itself.
#pragma once

#include "api.h"

namespace bdq {

struct Input {
  const void* data;
  Dims dims;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

class Run {
 public:
  Run(const OrtApi& api, OrtKernelContext& context) : api_(api), context_(context) {}

  const OrtApi& api() const { return api_; }
  OrtKernelContext& context() const { return context_; }

  // Throws std::invalid_argument when the node leaves the input out.
  Input input(int index) const;

  // Throws when memory cannot be had, or what the caller bound has another shape.
  void* output(int index, const Dims& dims) const;

  template <class T>
  T* output(int index, const Dims& dims) const {
    return static_cast<T*>(output(index, dims));
  }

 private:
  const OrtApi& api_;
  OrtKernelContext& context_;
};

}  // namespace bdq
