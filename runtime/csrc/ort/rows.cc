// Hadamard and DynamicFakeQuantize: docs/ops.md, "Hadamard" and "Other operators".
#include "../kernels/rows.h"

#include <algorithm>
#include <vector>

#include "families.h"
#include "thread_pool.h"

namespace bdq {
namespace {

constexpr int kMaxHadamard = 4096;

// Rows of x [..., K], each on its own.
template <class Derived>
class Rows : public Kernel {
 public:
  explicit Rows(const NodeInfo& node, Isa isa) : isa_(isa), threads_(ThreadCount::of(node)) {}

  void compute(const Run& run) const override {
    const Input x = run.input(0);
    if (x.dims.rank == 0) throw std::invalid_argument("x is a scalar, expected at least one dimension");
    const std::int64_t K = x.dims.back();
    static_cast<const Derived*>(this)->check_columns(K);
    float* y = run.output<float>(0, x.dims);
    const std::int64_t count = x.dims.count();
    if (count == 0) return;
    const std::int64_t rows = count / K;
    ThreadPool pool(run, *threads_);
    // Short rows are not worth a task each.
    const std::int64_t group = std::max<std::int64_t>(1, 4096 / K), groups = (rows + group - 1) / group;
    parallel_for_allocating(pool, static_cast<std::size_t>(groups), [&](std::size_t g) {
      const std::int64_t first = static_cast<std::int64_t>(g) * group, last = std::min(rows, first + group);
      for (std::int64_t row = first; row < last; ++row)
        static_cast<const Derived*>(this)->row(x.as<float>() + row * K, y + row * K, K);
    });
  }

 protected:
  const Isa isa_;

 private:
  const std::shared_ptr<ThreadCount> threads_;
};

class HadamardKernel final : public Rows<HadamardKernel> {
 public:
  HadamardKernel(const NodeInfo& node, Isa isa)
      : Rows(node, isa), size_(node.small_integer("size")), interleave_(node.small_integer("interleave")) {
    if (size_ < 1 || size_ > kMaxHadamard || (size_ & (size_ - 1)) != 0)
      throw std::invalid_argument("attribute size is " + std::to_string(size_) + ", expected a power of two up to 4096");
    if (interleave_ < 1) throw std::invalid_argument("attribute interleave is " + std::to_string(interleave_) + ", expected at least 1");
  }

  void check_columns(std::int64_t K) const {
    if (K % size_ != 0)
      throw std::invalid_argument("x has " + std::to_string(K) + " channels, expected a multiple of size, " + std::to_string(size_));
    if (K % interleave_ != 0)
      throw std::invalid_argument("x has " + std::to_string(K) + " channels, expected a multiple of interleave, " + std::to_string(interleave_));
  }

  void row(const float* x, float* y, std::int64_t K) const {
    if (interleave_ > 1) {  // not into y, which may be x
      thread_local std::vector<float> channels;
      channels.resize(static_cast<std::size_t>(K));
      interleave_row(x, channels.data(), K, interleave_);
      x = channels.data();
    }
    hadamard_row(x, y, K, size_, isa_);
  }

 private:
  const int size_;
  const int interleave_;
};

class FakeQuantize final : public Rows<FakeQuantize> {
 public:
  FakeQuantize(const NodeInfo& node, Isa isa)
      : Rows(node, isa), bits_(node.small_integer("bits")), clip_(node.number("clip")) {
    if (bits_ != 3 && bits_ != 4 && bits_ != 8 && bits_ != 16)
      throw std::invalid_argument("attribute bits is " + std::to_string(bits_) + ", expected 3, 4, 8 or 16");
    if (!(clip_ > 0.0f)) throw std::invalid_argument("attribute clip is " + std::to_string(clip_) + ", expected more than 0");
  }

  void check_columns(std::int64_t) const {}

  void row(const float* x, float* y, std::int64_t K) const {
    if (bits_ == 16) {
      if (x != y) std::copy(x, x + K, y);
      return;
    }
    thread_local std::vector<std::int8_t> codes;
    codes.resize(static_cast<std::size_t>(K));
    std::int32_t sum = 0;
    const float scale = quantize_row(x, codes.data(), K, K, bits_, clip_, &sum, isa_);
    for (std::int64_t k = 0; k < K; ++k) y[k] = static_cast<float>(codes[static_cast<std::size_t>(k)]) * scale;
  }

 private:
  const int bits_;
  const float clip_;
};

}  // namespace

std::unique_ptr<Kernel> make_hadamard(const NodeInfo& node, Isa isa) { return std::make_unique<HadamardKernel>(node, isa); }
std::unique_ptr<Kernel> make_fake_quantize(const NodeInfo& node, Isa isa) { return std::make_unique<FakeQuantize>(node, isa); }

void infer_same(const ShapeInference& shapes) {
  if (const SymbolicShape x = shapes.input("x"); !x.empty()) shapes.set_output(0, x);
}

}  // namespace bdq
