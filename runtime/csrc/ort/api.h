// ONNX Runtime's C API with errors as exceptions, and shapes that need no memory of their own.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bdq {

// Throws what `status` says; null is success.
inline void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

// Runs `work` and turns what it throws into a status: no exception may cross the C API.
template <class Work>
OrtStatus* guarded(const OrtApi& api, Work&& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

struct Dims {
  static constexpr std::size_t kMaxRank = 8;
  std::int64_t sizes[kMaxRank] = {};
  std::size_t rank = 0;

  Dims() = default;
  Dims(std::initializer_list<std::int64_t> values) {
    for (std::int64_t value : values) sizes[rank++] = value;
  }
  std::int64_t operator[](std::size_t i) const { return sizes[i]; }
  std::int64_t& operator[](std::size_t i) { return sizes[i]; }
  std::int64_t& back() { return sizes[rank - 1]; }
  std::int64_t back() const { return sizes[rank - 1]; }
  // Elements; of a tensor that exists, so they fit.
  std::int64_t count() const {
    std::int64_t product = 1;
    for (std::size_t i = 0; i < rank; ++i) product *= sizes[i];
    return product;
  }
  bool operator==(const Dims& other) const {
    if (rank != other.rank) return false;
    for (std::size_t i = 0; i < rank; ++i)
      if (sizes[i] != other.sizes[i]) return false;
    return true;
  }
  bool operator!=(const Dims& other) const { return !(*this == other); }
};

// "[2, 3, -1]"
std::string text(const Dims& dims);

// Throws std::invalid_argument for more than kMaxRank dimensions.
Dims dims_of(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info);
Dims dims_of(const OrtApi& api, const OrtValue* tensor);

const void* data_of(const OrtApi& api, const OrtValue* tensor);

}  // namespace bdq
