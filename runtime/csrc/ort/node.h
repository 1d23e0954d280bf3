// What a node says of itself when a session is created: attributes and constant inputs, all of it checked here.
#pragma once

#include <memory>
#include <string>

#include "api.h"
#include "opset.h"

namespace bdq {

// A constant input. On the CPU, `data` is aligned to its elements and lives as long as the kernel that holds it.
struct Constant {
  const void* data = nullptr;
  Dims dims;
  std::shared_ptr<void> copy;  // only where a model file holds it unaligned

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// Every member throws std::invalid_argument, in one line, when the node is not what the operator's table says.
class NodeInfo {
 public:
  NodeInfo(const OrtApi& api, const OrtKernelInfo& info, const Operator& op) : api_(api), info_(info), op_(op) {}

  const OrtApi& api() const { return api_; }
  const OrtKernelInfo& info() const { return info_; }
  const Operator& op() const { return op_; }

  // "bdq::LowBitLinear 'node name'"
  std::string label() const;

  std::int64_t integer(const char* name) const;  // an attribute: its default when the node leaves it out
  int small_integer(const char* name) const;     // one that fits an int
  bool flag(const char* name) const;             // 0 or 1
  float number(const char* name) const;          // finite
  std::string text(const char* name) const;

  bool has_input(const char* name) const { return op_.input(name) >= 0; }
  bool is_constant(const char* input) const;
  // A constant input of any shape, or of exactly `expected`.
  Constant constant(const char* input) const;
  Constant constant(const char* input, const Dims& expected) const;
  // The last dimension that the graph gives the input is `expected`, or unknown.
  void check_last_dimension(const char* input, std::int64_t expected) const;

 private:
  const OrtValue* find_constant(const char* input) const;
  // Whether the node has the attribute; fails when it has one of another type, or none and the operator wants it.
  bool found(OrtStatus* status, const Attribute& attribute) const;
  const Attribute& attribute(const char* name) const;

  const OrtApi& api_;
  const OrtKernelInfo& info_;
  const Operator& op_;
};

}  // namespace bdq
