#include "opset.h"

#include <cstdio>

#include "../kernels/isa.h"
#include "isa_names.h"

namespace bdq {
namespace {

using Values = std::vector<Value>;
using Attributes = std::vector<Attribute>;

template <class T>
std::vector<T> join(const std::vector<std::vector<T>>& parts) {
  std::vector<T> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

Attribute required(const char* name, Attribute::Kind kind) { return {name, kind, true, 0, 0.0f, {}}; }
Attribute integer(const char* name, std::int64_t value) { return {name, Attribute::kInt, false, value, 0.0f, {}}; }
Attribute number(const char* name, float value) { return {name, Attribute::kFloat, false, 0, value, {}}; }
Attribute text(const char* name, const char* value) { return {name, Attribute::kString, false, 0, 0.0f, value}; }

void add_linears(std::vector<Operator>& all) {
  const Attributes common = {required("K", Attribute::kInt),           required("N", Attribute::kInt),
                             required("weight_bits", Attribute::kInt), integer("weight_grid", 0),
                             integer("block_size", 0),                 required("activation_bits", Attribute::kInt),
                             number("activation_clip", 1.0f)};
  const Attributes hadamard = {required("hadamard_size", Attribute::kInt), integer("hadamard_interleave", 1)};
  for (bool rotated : {false, true}) {
    for (bool gated : {false, true}) {
      for (bool biased : {false, true}) {
        Operator op;
        op.name = std::string(rotated ? "Hadamard" : "") + (gated ? "Gated" : "") + "LowBitLinear" + (biased ? "Bias" : "");
        op.family = Operator::kLinear;
        op.inputs = join<Value>({{{"x", Element::kFloat}},
                                 rotated ? Values{{"diagonal", Element::kFloat}} : Values{},
                                 {{"weight", Element::kBytes}, {"scales", Element::kHalf}},
                                 biased ? Values{{"bias", Element::kFloat}} : Values{}});
        op.outputs = {{"y", Element::kFloat}};
        op.attributes = join<Attribute>({common,
                                         rotated ? hadamard : Attributes{},
                                         gated ? Attributes{text("gate", "silu")} : Attributes{}});
        all.push_back(std::move(op));
      }
    }
  }
}

void add_attentions(std::vector<Operator>& all) {
  const Attributes attributes = {
      required("num_heads", Attribute::kInt), required("kv_num_heads", Attribute::kInt),
      required("head_size", Attribute::kInt), required("key_bits", Attribute::kInt),
      required("value_bits", Attribute::kInt), number("key_clip", 1.0f),
      number("value_clip", 1.0f),             integer("hadamard", 0),
      required("scale", Attribute::kFloat),   number("softcap", 0.0f),
      integer("local_window_size", -1)};
  for (bool packed : {false, true}) {
    for (bool rotary : {false, true}) {
      Operator op;
      op.name = std::string(packed ? "Packed" : "") + (rotary ? "Rotary" : "") + "KVAttention";
      op.family = Operator::kAttention;
      op.inputs = join<Value>(
          {packed ? Values{{"qkv", Element::kFloat}}
                  : Values{{"query", Element::kFloat}, {"key", Element::kFloat}, {"value", Element::kFloat}},
           {{"past_key", Element::kBytes},
            {"past_value", Element::kBytes},
            {"seqlens_k", Element::kIndex},
            {"total_sequence_length", Element::kIndex}},
           rotary ? Values{{"cos_cache", Element::kFloat}, {"sin_cache", Element::kFloat}} : Values{}});
      op.outputs = {{"output", Element::kFloat}, {"present_key", Element::kBytes}, {"present_value", Element::kBytes}};
      op.attributes = attributes;
      all.push_back(std::move(op));
    }
  }
}

std::vector<Operator> make() {
  std::vector<Operator> all;
  add_linears(all);
  add_attentions(all);
  const Values x = {{"x", Element::kFloat}}, y = {{"y", Element::kFloat}};
  all.push_back({"Hadamard", Operator::kHadamard, x, y, {required("size", Attribute::kInt), integer("interleave", 1)}});
  all.push_back({"DynamicFakeQuantize",
                 Operator::kFakeQuantize,
                 x,
                 y,
                 {required("bits", Attribute::kInt), number("clip", 1.0f)}});
  return all;
}

std::string quoted(const std::string& s) { return '"' + s + '"'; }  // names only: nothing to escape

std::string json(const Values& values) {
  static const char* const names[] = {"float32", "float16", "uint8", "int32"};
  std::string s;
  for (const Value& v : values) s += (s.empty() ? "" : ", ") + quoted(v.name) + ": " + quoted(names[static_cast<int>(v.type)]);
  return '{' + s + '}';
}

std::string json(const Attributes& attributes) {
  static const char* const kinds[] = {"int", "float", "str"};
  std::string s;
  for (const Attribute& a : attributes) {
    s += (s.empty() ? "" : ", ") + quoted(a.name) + ": {\"type\": " + quoted(kinds[a.kind]);
    char value[32] = "";
    if (a.kind == Attribute::kInt) std::snprintf(value, sizeof value, "%lld", static_cast<long long>(a.integer));
    if (a.kind == Attribute::kFloat) std::snprintf(value, sizeof value, "%.9g", static_cast<double>(a.number));
    if (!a.required) s += ", \"default\": " + (a.kind == Attribute::kString ? quoted(a.text) : std::string(value));
    s += '}';
  }
  return '{' + s + '}';
}

}  // namespace

int Operator::input(const std::string& wanted) const {
  for (std::size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].name == wanted) return static_cast<int>(i);
  return -1;
}

const Attribute* Operator::attribute(const std::string& wanted) const {
  for (const Attribute& a : attributes)
    if (a.name == wanted) return &a;
  return nullptr;
}

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = make();
  return all;
}

const char* describe() {
  static const std::string text = [] {
    std::string isas, ops;
    for (Isa isa : kIsas)
      if (isa_supported(isa)) isas += (isas.empty() ? "" : ", ") + quoted(isa_name(isa));
    for (const Operator& op : operators())
      ops += (ops.empty() ? "" : ", ") + quoted(op.name) + ": {\"inputs\": " + json(op.inputs) +
             ", \"outputs\": " + json(op.outputs) + ", \"attributes\": " + json(op.attributes) + '}';
    return "{\"version\": " + std::to_string(kOpsetVersion) + ", \"isas\": [" + isas + "], \"operators\": {" + ops + "}}";
  }();
  return text.c_str();
}

}  // namespace bdq
