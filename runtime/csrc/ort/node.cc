#include "node.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace bdq {
namespace {

constexpr const char* kKinds[] = {"an int", "a float", "a string"};
constexpr std::size_t kSizes[] = {sizeof(float), sizeof(std::uint16_t), sizeof(std::uint8_t), sizeof(std::int32_t)};

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string short_text(const std::string& s) { return s.size() > 80 ? s.substr(0, 80) + "..." : s; }

}  // namespace

std::string NodeInfo::label() const {
  std::string name;
  std::size_t size = 0;
  OrtStatus* status = api_.KernelInfo_GetNodeName(&info_, nullptr, &size);
  if (status == nullptr && size > 1) {
    name.resize(size);
    status = api_.KernelInfo_GetNodeName(&info_, name.data(), &size);
    name.resize(size - 1);
  }
  if (status != nullptr) api_.ReleaseStatus(status);
  return "bdq::" + op_.name + " '" + short_text(name) + "'";
}

const Attribute& NodeInfo::attribute(const char* name) const {
  const Attribute* found = op_.attribute(name);
  if (found == nullptr) throw std::logic_error(std::string("no attribute ") + name + " in the operator's table");
  return *found;
}

bool NodeInfo::found(OrtStatus* status, const Attribute& attribute) const {
  if (status == nullptr) return true;
  const std::string message = api_.GetErrorMessage(status);
  api_.ReleaseStatus(status);
  // The API has no "has attribute". Were this text to change, an attribute left out would be refused, not misread.
  const bool absent = message.find("No attribute with name") != std::string::npos;
  if (absent && !attribute.required) return false;
  if (absent) fail("attribute " + attribute.name + " is missing, expected " + kKinds[attribute.kind]);
  fail("attribute " + attribute.name + " is not " + kKinds[attribute.kind]);
}

std::int64_t NodeInfo::integer(const char* name) const {
  const Attribute& wanted = attribute(name);
  std::int64_t value = 0;
  return found(api_.KernelInfoGetAttribute_int64(&info_, name, &value), wanted) ? value : wanted.integer;
}

int NodeInfo::small_integer(const char* name) const {
  const std::int64_t value = integer(name);
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max())
    fail("attribute " + std::string(name) + " is " + std::to_string(value) + ", which is out of range");
  return static_cast<int>(value);
}

bool NodeInfo::flag(const char* name) const {
  const std::int64_t value = integer(name);
  if (value != 0 && value != 1) fail("attribute " + std::string(name) + " is " + std::to_string(value) + ", expected 0 or 1");
  return value == 1;
}

float NodeInfo::number(const char* name) const {
  const Attribute& wanted = attribute(name);
  float value = 0.0f;
  if (!found(api_.KernelInfoGetAttribute_float(&info_, name, &value), wanted)) return wanted.number;
  if (!std::isfinite(value)) fail("attribute " + std::string(name) + " is " + std::to_string(value) + ", expected a finite number");
  return value;
}

std::string NodeInfo::text(const char* name) const {
  const Attribute& wanted = attribute(name);
  std::size_t size = 0;
  if (!found(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size), wanted)) return wanted.text;
  std::string value(size, '\0');
  check(api_, api_.KernelInfoGetAttribute_string(&info_, name, value.data(), &size));
  if (!value.empty()) value.resize(value.size() - 1);  // the terminating zero
  return short_text(value);
}

const OrtValue* NodeInfo::find_constant(const char* input) const {
  const int index = op_.input(input);
  if (index < 0) throw std::logic_error(std::string("no input ") + input + " in the operator's table");
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api_, api_.KernelInfoGetConstantInput_tensor(&info_, static_cast<std::size_t>(index), &is_constant, &value));
  return is_constant != 0 ? value : nullptr;
}

bool NodeInfo::is_constant(const char* input) const { return find_constant(input) != nullptr; }

Constant NodeInfo::constant(const char* input) const {
  const OrtValue* value = find_constant(input);
  if (value == nullptr) fail("input " + std::string(input) + " is not constant, expected an initializer that is no graph input");
  Constant constant;
  constant.dims = dims_of(api_, value);
  constant.data = data_of(api_, value);
  const std::size_t size = kSizes[static_cast<int>(op_.inputs[static_cast<std::size_t>(op_.input(input))].type)];
  if (reinterpret_cast<std::uintptr_t>(constant.data) % size != 0) {
    // Device memory is always aligned, so this is the CPU's. A mapped file need not be.
    const std::size_t bytes = static_cast<std::size_t>(constant.dims.count()) * size;
    constant.copy = std::shared_ptr<void>(::operator new(bytes), [](void* p) { ::operator delete(p); });
    constant.data = std::memcpy(constant.copy.get(), constant.data, bytes);
  }
  return constant;
}

Constant NodeInfo::constant(const char* input, const Dims& expected) const {
  const OrtValue* value = find_constant(input);
  if (value != nullptr) {
    const Dims dims = dims_of(api_, value);
    if (dims != expected)
      fail("input " + std::string(input) + " is " + bdq::text(dims) + ", expected " + bdq::text(expected) +
           " for these attributes");
  }
  return constant(input);
}

void NodeInfo::check_last_dimension(const char* input, std::int64_t expected) const {
  OrtTypeInfo* type = nullptr;
  check(api_, api_.KernelInfo_GetInputTypeInfo(&info_, static_cast<std::size_t>(op_.input(input)), &type));
  struct Release {
    const OrtApi& api;
    OrtTypeInfo* type;
    ~Release() { api.ReleaseTypeInfo(type); }
  } release{api_, type};
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  check(api_, api_.CastTypeInfoToTensorInfo(type, &tensor));
  if (tensor == nullptr) fail("input " + std::string(input) + " is no tensor");
  const Dims dims = dims_of(api_, tensor);
  // Rank 0 is also what a graph without shapes looks like; run time decides then.
  if (dims.rank > 0 && dims.back() >= 0 && dims.back() != expected)
    fail("input " + std::string(input) + " is " + bdq::text(dims) + ", expected " + std::to_string(expected) +
         " in the last dimension");
}

}  // namespace bdq
