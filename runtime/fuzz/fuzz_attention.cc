// Any attributes, lengths and cache bytes: refused before anything is written, or computed inside the arrays; the cache that each
// instruction set writes is the same, and so is the output, to rounding, where numbers are of a size that attention has.
#include "kv_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "input.h"
#include "workers.h"

namespace {

void multiply(std::vector<float>& values, float factor) {
  for (float& value : values) value *= factor;
}

// Grids of the rows of a cache whose values lie between -2 and 2.
void tame_grids(std::uint8_t* rows, std::size_t bytes, std::int64_t row_bytes, int bits) {
  for (std::size_t end = static_cast<std::size_t>(row_bytes); end <= bytes; end += static_cast<std::size_t>(row_bytes)) {
    std::uint8_t* tail = rows + end - 4;
    const int scale = (33 - bits) << 10, zero = 32768 + tail[2] % (1 << bits);  // 2^(1 - bits)
    tail[0] = static_cast<std::uint8_t>(scale);
    tail[1] = static_cast<std::uint8_t>(scale >> 8);
    tail[2] = static_cast<std::uint8_t>(zero);
    tail[3] = static_cast<std::uint8_t>(zero >> 8);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  bdq::AttentionSpec spec;
  spec.num_heads = input.pick<std::int64_t>({1, 2, 3, 4, 6, 9});
  spec.kv_num_heads = input.pick<std::int64_t>({1, 2, 3});
  spec.head_size = input.pick<std::int64_t>({8, 16, 24, 32, 64, 128, 256});
  spec.key_bits = input.pick<int>({3, 4, 8});
  spec.value_bits = input.pick<int>({3, 4, 8});
  spec.key_clip = input.pick<float>({1.0f, 0.9f});
  spec.value_clip = input.pick<float>({1.0f, 0.8f});
  spec.hadamard = input.take<std::uint8_t>() & 1;
  spec.scale = input.pick<float>({0.125f, 1.0f});
  spec.softcap = input.pick<float>({0.0f, 0.0f, 30.0f});
  spec.local_window_size = input.pick<std::int64_t>({-1, -1, 0, 1, 5, 40});
  try {
    bdq::check_attention(spec);
  } catch (const std::invalid_argument&) {
    return 0;
  }
  if (spec.num_heads * spec.head_size > 4096) return 0;

  bdq::AttentionArguments a;
  a.batch = 1 + input.below(3);
  a.tokens = 1 + input.below(input.take<std::uint8_t>() & 1 ? 70 : 3);
  a.past_positions = input.below(150);
  const std::int64_t total = input.pick<std::int32_t>(
      {static_cast<std::int32_t>(a.tokens), static_cast<std::int32_t>(a.past_positions), static_cast<std::int32_t>(a.tokens + a.past_positions)});
  if (total > 4096) return 0;
  a.total_sequence_length = total;
  a.present_positions = std::max(a.past_positions, total);
  if (a.present_positions < 1) return 0;
  std::vector<std::int32_t> lengths;
  for (std::int64_t b = 0; b < a.batch; ++b)
    lengths.push_back(input.pick<std::int32_t>({static_cast<std::int32_t>(total) - 1, static_cast<std::int32_t>(a.tokens) - 1,
                                                 static_cast<std::int32_t>(input.below(200))}));
  a.seqlens_k = lengths.data();
  const std::int64_t query = spec.num_heads * spec.head_size, key = spec.kv_num_heads * spec.head_size;
  std::vector<float> q = input.floats(a.batch * a.tokens * query), k = input.floats(a.batch * a.tokens * key),
                     v = input.floats(a.batch * a.tokens * key);
  a.query = q.data();
  a.key = k.data();
  a.value = v.data();
  a.query_stride = query;
  a.key_stride = a.value_stride = key;
  std::vector<float> cosines, sines;
  if (input.take<std::uint8_t>() & 1) {
    a.rotary_dim = 2 * (1 + input.below(spec.head_size / 2));
    a.positions = input.below(200);
    cosines = input.floats(a.positions * a.rotary_dim / 2);
    sines = input.floats(a.positions * a.rotary_dim / 2);
    a.cos_cache = a.positions > 0 ? cosines.data() : nullptr;
    a.sin_cache = a.positions > 0 ? sines.data() : nullptr;
  }
  const std::int64_t rows = a.batch * spec.kv_num_heads;
  const std::int64_t key_row = bdq::cache_row_bytes(spec.head_size, spec.key_bits), value_row = bdq::cache_row_bytes(spec.head_size, spec.value_bits);
  const auto past_key = input.bytes(rows * a.past_positions * key_row), past_value = input.bytes(rows * a.past_positions * value_row);
  const bool tame = input.take<std::uint8_t>() & 1;
  if (tame) {
    for (std::vector<float>* part : {&q, &k, &v, &cosines, &sines}) multiply(*part, 0.0078125f);  // 2^-7: up to 1
    tame_grids(past_key.get(), static_cast<std::size_t>(rows * a.past_positions * key_row), key_row, spec.key_bits);
    tame_grids(past_value.get(), static_cast<std::size_t>(rows * a.past_positions * value_row), value_row, spec.value_bits);
  }
  const bool shared = a.past_positions == a.present_positions && (input.take<std::uint8_t>() & 1);
  fuzz::ManyWorkers workers(1 + input.take<std::uint8_t>() % 5);
  const std::size_t key_bytes = static_cast<std::size_t>(rows * a.present_positions * key_row);
  const std::size_t value_bytes = static_cast<std::size_t>(rows * a.present_positions * value_row);

  std::vector<std::uint8_t> expected_key, expected_value;
  std::vector<float> expected_output;
  std::vector<float> output(static_cast<std::size_t>(a.batch * a.tokens * query));
  a.output = output.data();
  bool finite = true, small = tame && std::fabs(spec.scale) <= 1.0f && (spec.softcap == 0.0f || spec.softcap >= 1.0f);
  for (const std::vector<float>* part : std::initializer_list<const std::vector<float>*>{&q, &k, &v, &cosines, &sines})
    for (float value : *part) {
      finite = finite && std::isfinite(value);
      small = small && std::fabs(value) <= 1.0f;
    }
  std::vector<bdq::Isa> isas = {bdq::Isa::kScalar};
  for (bdq::Isa isa : fuzz::kIsas)
    if (bdq::isa_supported(isa)) isas.push_back(isa);
  for (bdq::Isa isa : isas) {
    std::unique_ptr<std::uint8_t[]> keys(new std::uint8_t[key_bytes]), values(new std::uint8_t[value_bytes]);
    if (shared) {
      std::memcpy(keys.get(), past_key.get(), key_bytes);
      std::memcpy(values.get(), past_value.get(), value_bytes);
    }
    a.past_key = shared ? keys.get() : past_key.get();
    a.past_value = shared ? values.get() : past_value.get();
    a.present_key = keys.get();
    a.present_value = values.get();
    try {
      bdq::kv_attention(spec, a, isa, workers);
    } catch (const std::invalid_argument&) {
      if (shared && (std::memcmp(keys.get(), past_key.get(), key_bytes) != 0 || std::memcmp(values.get(), past_value.get(), value_bytes) != 0))
        std::abort();
      return 0;
    }
    if (isa == bdq::Isa::kScalar) {
      expected_key.assign(keys.get(), keys.get() + key_bytes);
      expected_value.assign(values.get(), values.get() + value_bytes);
      expected_output = output;
    } else if (finite && (std::memcmp(keys.get(), expected_key.data(), key_bytes) != 0 ||
                          std::memcmp(values.get(), expected_value.data(), value_bytes) != 0)) {
      std::abort();
    }
    for (std::size_t i = 0; small && i < output.size(); ++i) {
      if (!(std::fabs(output[i] - expected_output[i]) <= 1e-4f)) std::abort();
    }
  }
  return 0;
}
