// The operators that this library registers: the table of bdq_runtime/opset.py, in C++. A test compares the two.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bdq {

constexpr int kOpsetVersion = 2;
constexpr int kFirstOpsetVersion = 1;  // models of these versions are run, too

enum class Element { kFloat, kHalf, kBytes, kIndex };  // float32, float16, uint8, int32

struct Value {
  std::string name;
  Element type;
};

struct Attribute {
  enum Kind { kInt, kFloat, kString };
  std::string name;
  Kind kind;
  bool required = false;  // without a default
  std::int64_t integer = 0;
  float number = 0.0f;
  std::string text;
};

struct Operator {
  enum Family { kLinear, kAttention, kHadamard, kFakeQuantize };
  std::string name;
  Family family;
  std::vector<Value> inputs;  // all required
  std::vector<Value> outputs;
  std::vector<Attribute> attributes;

  // Index of an input, or -1.
  int input(const std::string& wanted) const;
  // Null when there is none of that name.
  const Attribute* attribute(const std::string& wanted) const;
};

const std::vector<Operator>& operators();

// The table, its version and the instruction sets that this processor can run, as JSON.
const char* describe();

}  // namespace bdq
