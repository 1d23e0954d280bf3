// Fuzzer input as numbers and arrays.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "isa.h"

namespace fuzz {

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t n = size_ < sizeof(T) ? size_ : sizeof(T);
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }

  // Mostly one of `values`, sometimes anything.
  template <class T>
  T pick(std::initializer_list<T> values) {
    const std::uint8_t choice = take<std::uint8_t>();
    return choice >= 250 ? take<T>() : *(values.begin() + choice % values.size());
  }

  std::int64_t below(std::int64_t limit) { return take<std::uint16_t>() % limit; }

  // Rows of a few sizes, some of them with infinities and NaN.
  std::vector<float> floats(std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    const bool raw = take<std::uint8_t>() >= 224;
    std::uint32_t state = take<std::uint32_t>();
    for (float& value : values) {
      const std::uint32_t word = next(state) ^ (raw ? take<std::uint32_t>() : std::uint32_t{take<std::uint16_t>()} << 16);
      if (raw) std::memcpy(&value, &word, sizeof value);
      else value = static_cast<float>(static_cast<std::int16_t>(word >> 16)) * 0.00390625f;
    }
    return values;
  }

  // An array of exactly `count` elements on the heap, so that the address sanitizer sees the first byte beyond.
  std::unique_ptr<std::uint8_t[]> bytes(std::int64_t count) {
    std::unique_ptr<std::uint8_t[]> values(new std::uint8_t[static_cast<std::size_t>(count)]);
    std::uint32_t state = take<std::uint32_t>();
    for (std::int64_t i = 0; i < count; ++i) values[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(next(state) >> 24) ^ take<std::uint8_t>();
    return values;
  }

 private:
  // The input is short, and what is taken behind its end is 0: a generator goes on there.
  static std::uint32_t next(std::uint32_t& state) { return state = state * 1664525u + 1013904223u; }

  const std::uint8_t* data_;
  std::size_t size_;
};

constexpr bdq::Isa kIsas[] = {bdq::Isa::kAvx2, bdq::Isa::kAvxVnni, bdq::Isa::kAvx512Vnni, bdq::Isa::kAmx, bdq::Isa::kNeonDot};

}  // namespace fuzz
