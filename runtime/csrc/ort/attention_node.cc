#include "attention_node.h"

#include <algorithm>

namespace bdq {
namespace {

AttentionSpec spec_of(const NodeInfo& node) {
  AttentionSpec spec;
  spec.num_heads = node.integer("num_heads");
  spec.kv_num_heads = node.integer("kv_num_heads");
  spec.head_size = node.integer("head_size");
  spec.key_bits = node.small_integer("key_bits");
  spec.value_bits = node.small_integer("value_bits");
  spec.key_clip = node.number("key_clip");
  spec.value_clip = node.number("value_clip");
  spec.hadamard = node.flag("hadamard");
  spec.scale = node.number("scale");
  spec.softcap = node.number("softcap");
  spec.local_window_size = node.integer("local_window_size");
  return spec;
}

void expect(const char* name, const Dims& found, const Dims& expected) {
  if (found != expected)
    throw std::invalid_argument(std::string(name) + " is " + text(found) + ", expected " + text(expected));
}

}  // namespace

AttentionNode::AttentionNode(const NodeInfo& node)
    : spec_(spec_of(node)), packed_(node.has_input("qkv")), rotary_(node.has_input("cos_cache")), past_(node.op().input("past_key")) {
  check_attention(spec_);
  query_size_ = spec_.num_heads * spec_.head_size;
  key_size_ = spec_.kv_num_heads * spec_.head_size;
  key_row_ = cache_row_bytes(spec_.head_size, spec_.key_bits);
  value_row_ = cache_row_bytes(spec_.head_size, spec_.value_bits);
  if (packed_) {
    node.check_last_dimension("qkv", query_size_ + 2 * key_size_);
  } else {
    node.check_last_dimension("query", query_size_);
    node.check_last_dimension("key", key_size_);
    node.check_last_dimension("value", key_size_);
  }
  node.check_last_dimension("past_key", key_row_);
  node.check_last_dimension("past_value", value_row_);
  if (rotary_ && node.is_constant("cos_cache") && node.is_constant("sin_cache")) {
    cos_ = node.constant("cos_cache");
    sin_ = node.constant("sin_cache");
    check_rotary(cos_.dims, sin_.dims);
  }
}

AttentionArguments AttentionNode::arguments(const Run& run) const {
  AttentionArguments arguments;
  read_tokens(run, arguments);
  read_cache(run, arguments);
  if (rotary_) read_rotary(run, arguments);
  const Dims output = {arguments.batch, arguments.tokens, query_size_};
  arguments.output = run.output<float>(0, output);
  arguments.present_key =
      run.output<std::uint8_t>(1, {arguments.batch, spec_.kv_num_heads, arguments.present_positions, key_row_});
  arguments.present_value =
      run.output<std::uint8_t>(2, {arguments.batch, spec_.kv_num_heads, arguments.present_positions, value_row_});
  return arguments;
}

void AttentionNode::read_tokens(const Run& run, AttentionArguments& arguments) const {
  const Input query = run.input(0);
  const char* name = packed_ ? "qkv" : "query";
  if (query.dims.rank != 3) throw std::invalid_argument(std::string(name) + " is " + text(query.dims) + ", expected 3 dimensions");
  arguments.batch = query.dims[0];
  arguments.tokens = query.dims[1];
  if (arguments.tokens < 1) throw std::invalid_argument(std::string(name) + " is " + text(query.dims) + ", expected at least one token");
  const std::int64_t width = packed_ ? query_size_ + 2 * key_size_ : query_size_;
  expect(name, query.dims, {arguments.batch, arguments.tokens, width});
  arguments.query = query.as<float>();
  arguments.query_stride = width;
  if (packed_) {
    arguments.key = arguments.query + query_size_;
    arguments.value = arguments.key + key_size_;
    arguments.key_stride = arguments.value_stride = width;
    return;
  }
  const Input key = run.input(1), value = run.input(2);
  expect("key", key.dims, {arguments.batch, arguments.tokens, key_size_});
  expect("value", value.dims, {arguments.batch, arguments.tokens, key_size_});
  arguments.key = key.as<float>();
  arguments.value = value.as<float>();
  arguments.key_stride = arguments.value_stride = key_size_;
}

void AttentionNode::read_cache(const Run& run, AttentionArguments& arguments) const {
  const Input key = run.input(past_), value = run.input(past_ + 1);
  const Input lengths = run.input(past_ + 2), total = run.input(past_ + 3);
  arguments.past_positions = key.dims.rank == 4 ? key.dims[2] : 0;
  expect("past_key", key.dims, {arguments.batch, spec_.kv_num_heads, arguments.past_positions, key_row_});
  expect("past_value", value.dims, {arguments.batch, spec_.kv_num_heads, arguments.past_positions, value_row_});
  arguments.past_key = key.as<std::uint8_t>();
  arguments.past_value = value.as<std::uint8_t>();
  if (lengths.dims.count() != arguments.batch)
    throw std::invalid_argument("seqlens_k is " + text(lengths.dims) + ", expected [" + std::to_string(arguments.batch) + "]");
  arguments.seqlens_k = lengths.as<std::int32_t>();
  if (total.dims.count() != 1) throw std::invalid_argument("total_sequence_length is " + text(total.dims) + ", expected a scalar");
  arguments.total_sequence_length = *total.as<std::int32_t>();
  if (arguments.total_sequence_length < arguments.tokens)
    throw std::invalid_argument("total_sequence_length is " + std::to_string(arguments.total_sequence_length) + ", expected at least the " +
                                std::to_string(arguments.tokens) + " tokens of this call");
  if (arguments.total_sequence_length > arguments.past_positions + arguments.tokens)
    throw std::invalid_argument("total_sequence_length is " + std::to_string(arguments.total_sequence_length) + ", expected at most the " +
                                std::to_string(arguments.past_positions) + " positions of past and " + std::to_string(arguments.tokens) +
                                " tokens of this call");
  // The kernel checks the lengths too, but only after memory for the present was had.
  for (std::int64_t b = 0; b < arguments.batch; ++b)
    if (arguments.seqlens_k[b] >= arguments.total_sequence_length)
      throw std::invalid_argument("seqlens_k is " + std::to_string(arguments.seqlens_k[b]) + ", expected less than total_sequence_length, " +
                                  std::to_string(arguments.total_sequence_length));
  arguments.present_positions = std::max(arguments.past_positions, arguments.total_sequence_length);
}

void AttentionNode::read_rotary(const Run& run, AttentionArguments& arguments) const {
  Dims dims = cos_.dims;
  arguments.cos_cache = cos_.as<float>();
  arguments.sin_cache = sin_.as<float>();
  if (cos_.data == nullptr) {
    const Input cosines = run.input(past_ + 4), sines = run.input(past_ + 5);
    check_rotary(cosines.dims, sines.dims);
    dims = cosines.dims;
    arguments.cos_cache = cosines.as<float>();
    arguments.sin_cache = sines.as<float>();
  }
  arguments.positions = dims[0];
  arguments.rotary_dim = 2 * dims[1];
}

void AttentionNode::check_rotary(const Dims& cosines, const Dims& sines) const {
  if (cosines.rank != 2 || cosines[1] < 1 || cosines[1] > spec_.head_size / 2)
    throw std::invalid_argument("cos_cache is " + text(cosines) + ", expected [positions, rotary_dim / 2] with rotary_dim at most " +
                                std::to_string(spec_.head_size));
  expect("sin_cache", sines, cosines);
}

}  // namespace bdq
