// Shapes of outputs before a model runs. Through the C API: the C++ wrapper of 1.17 sets every static dimension to 1.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "opset.h"

namespace bdq {

// One dimension: its size, a name, or nothing known (-1 and "").
struct SymbolicDim {
  std::int64_t size = -1;
  std::string name;
};
using SymbolicShape = std::vector<SymbolicDim>;

class ShapeInference {
 public:
  ShapeInference(const OrtApi& api, OrtShapeInferContext& context, const Operator& op)
      : api_(api), context_(context), op_(op) {}

  // Empty when nothing is known.
  SymbolicShape input(const char* name) const { return input(op_.input(name)); }
  SymbolicShape input(int index) const;
  // 0 when the node does not have it: the kernel's constructor reports that.
  std::int64_t integer(const char* attribute) const;
  void set_output(std::size_t index, const SymbolicShape& shape) const;

 private:
  const OrtApi& api_;
  OrtShapeInferContext& context_;
  const Operator& op_;
};

}  // namespace bdq
