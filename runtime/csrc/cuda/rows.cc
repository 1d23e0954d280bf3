#include "rows.h"

#include <algorithm>
#include <cmath>

#include "../ort/families.h"
#include "kernels.h"

namespace bdq::cuda {
namespace {

constexpr int kMaxHadamard = 4096;

// The image whose segments hold whole Hadamard blocks.
std::string with_segment(const char* name, std::int64_t size) {
  return std::string(name) + (size <= 1024 ? "_block1024" : "_block4096");
}

float high_of(int bits) { return static_cast<float>((1 << (bits - 1)) - 1); }

class HadamardKernel final : public Kernel {
 public:
  explicit HadamardKernel(const NodeInfo& node)
      : size_(node.small_integer("size")), interleave_(node.small_integer("interleave")), scratch_(Scratch::of(node)) {
    if (size_ < 1 || size_ > kMaxHadamard || (size_ & (size_ - 1)) != 0)
      throw std::invalid_argument("attribute size is " + std::to_string(size_) + ", expected a power of two up to 4096");
    if (interleave_ < 1) throw std::invalid_argument("attribute interleave is " + std::to_string(interleave_) + ", expected at least 1");
  }

  void compute(const Run& run) const override {
    const Input x = run.input(0);
    if (x.dims.rank == 0) throw std::invalid_argument("x is a scalar, expected at least one dimension");
    const std::int64_t K = x.dims.back();
    if (K % size_ != 0)
      throw std::invalid_argument("x has " + std::to_string(K) + " channels, expected a multiple of size, " + std::to_string(size_));
    if (K % interleave_ != 0)
      throw std::invalid_argument("x has " + std::to_string(K) + " channels, expected a multiple of interleave, " + std::to_string(interleave_));
    float* y = run.output<float>(0, x.dims);
    if (x.dims.count() == 0) return;
    Launcher launcher(run, *scratch_, 0);
    const float* from = x.as<float>();
    if (interleave_ > 1 && from == y) {
      auto* copy = launcher.scratch<float>(x.dims.count());
      launcher.copy(copy, from, static_cast<std::size_t>(x.dims.count()) * sizeof(float));
      from = copy;
    }
    hadamard_rows(launcher, from, y, x.dims.count() / K, K, {size_, nullptr, interleave_});
  }

 private:
  const int size_;
  const int interleave_;
  const std::shared_ptr<Scratch> scratch_;
};

class FakeQuantizeKernel final : public Kernel {
 public:
  explicit FakeQuantizeKernel(const NodeInfo& node)
      : bits_(node.small_integer("bits")), clip_(node.number("clip")), scratch_(Scratch::of(node)) {
    if (bits_ != 3 && bits_ != 4 && bits_ != 8 && bits_ != 16)
      throw std::invalid_argument("attribute bits is " + std::to_string(bits_) + ", expected 3, 4, 8 or 16");
    if (!(clip_ > 0.0f)) throw std::invalid_argument("attribute clip is " + std::to_string(clip_) + ", expected more than 0");
  }

  void compute(const Run& run) const override {
    const Input x = run.input(0);
    if (x.dims.rank == 0) throw std::invalid_argument("x is a scalar, expected at least one dimension");
    float* y = run.output<float>(0, x.dims);
    if (x.dims.count() == 0) return;
    Launcher launcher(run, *scratch_, 0);
    const std::int64_t K = x.dims.back();
    if (bits_ == 16) {
      launcher.copy(y, x.data, static_cast<std::size_t>(x.dims.count()) * sizeof(float));
    } else {
      fake_quantize_rows(launcher, x.as<float>(), y, x.dims.count() / K, K, bits_, clip_);
    }
  }

 private:
  const int bits_;
  const float clip_;
  const std::shared_ptr<Scratch> scratch_;
};

}  // namespace

HadamardConstants hadamard_constants(std::int64_t size) {
  std::int32_t log_n = 0;
  while ((std::int64_t{1} << log_n) < size) ++log_n;
  return {log_n, std::ldexp(1.0f, -std::min(24 - log_n, 20)), static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)))};
}

void hadamard_rows(Launcher& launcher, const float* x, float* y, std::int64_t M, std::int64_t K, const Hadamard& hadamard) {
  const HadamardConstants h = hadamard_constants(hadamard.size);
  launcher.launch(with_segment("bdq_hadamard_rows", hadamard.size), {M}, Pointer{x}, Pointer{hadamard.diagonal}, Pointer{y}, int32("K", K),
                  std::int32_t{hadamard.interleave}, h.log_n, h.grid, h.root, std::int32_t{hadamard.diagonal != nullptr});
}

Codes quantize_rows(Launcher& launcher, const float* x, std::int64_t M, std::int64_t K, std::int64_t padded, int bits, float clip,
                    int log_fields, bool sums, const Hadamard& hadamard) {
  const Codes to = {launcher.scratch<std::int8_t>(M * padded), launcher.scratch<float>(M), launcher.scratch<std::int32_t>(M),
                    sums ? launcher.scratch<std::int32_t>(M * padded / 32) : nullptr};
  const float high = high_of(bits), factor = clip / high;
  const std::int32_t width = int32("K", K), padded_width = int32("K", padded), has_sums = sums;
  if (hadamard.size == 0) {
    launcher.launch("bdq_quantize_rows_block1024", {M}, Pointer{x}, Pointer{to.codes}, Pointer{to.scales}, Pointer{to.totals}, Pointer{to.sums},
                    width, padded_width, factor, high, std::int32_t{log_fields}, has_sums);
    return to;
  }
  const HadamardConstants h = hadamard_constants(hadamard.size);
  const auto* rotated = launcher.scratch<float>(M * K);
  launcher.launch(with_segment("bdq_rotate_quantize_rows", hadamard.size), {M}, Pointer{x}, Pointer{hadamard.diagonal}, Pointer{rotated},
                  Pointer{to.codes}, Pointer{to.scales}, Pointer{to.totals}, Pointer{to.sums}, width, padded_width, std::int32_t{hadamard.interleave}, h.log_n,
                  h.grid, h.root, factor, high, std::int32_t{log_fields}, has_sums);
  return to;
}

void fake_quantize_rows(Launcher& launcher, const float* x, float* y, std::int64_t M, std::int64_t K, int bits, float clip) {
  const float high = high_of(bits);
  launcher.launch("bdq_fake_quantize_rows_block1024", {M}, Pointer{x}, Pointer{y}, int32("K", K), clip / high, high);
}

std::unique_ptr<Kernel> make_hadamard(const NodeInfo& node, Isa) { return std::make_unique<HadamardKernel>(node); }
std::unique_ptr<Kernel> make_fake_quantize(const NodeInfo& node, Isa) { return std::make_unique<FakeQuantizeKernel>(node); }

}  // namespace bdq::cuda
