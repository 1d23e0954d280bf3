// LowBitLinear and its variants on the GPU: rows.py, then gemv.py, gemm.py or float_gemm.py.
#include "../ort/linear_node.h"

#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace bdq::cuda {
namespace {

constexpr std::int64_t kGemvRows = 4;                 // tokens for which panels are streamed once each
constexpr std::int64_t kScratchBytes = 64 << 20;      // rows are quantized in batches of about so much
constexpr std::int64_t kRowBatch = 128;               // batches are multiples of it

struct Tile {
  std::int64_t rows, tokens;  // panel rows and tokens of a block
};

// What a weight means: multiple * code - zero; and where scales, gate and bias are.
struct Arguments {
  std::int32_t multiple, zero, blocks, log_block, gate, has_bias;
};

int log2_of(std::int64_t size) {
  int log = 0;
  while ((std::int64_t{1} << log) < size) ++log;
  return log;
}

// Codes of one column that a byte of a plane holds, as a logarithm; 3 bits go by their 1-bit plane.
int log_fields_of(int bits) { return bits == 8 ? 0 : bits == 4 ? 1 : bits == 2 ? 2 : 3; }

std::string gemm_name(int bits, const Tile& tile, bool blocked) {
  return "bdq_low_bit_gemm_bits" + std::to_string(bits) + "_bn" + std::to_string(tile.rows) + "_bm" + std::to_string(tile.tokens) +
         "_blocked" + (blocked ? "1" : "0");
}

class Linear final : public Kernel {
 public:
  explicit Linear(const NodeInfo& node) : node_(node), op_(node.op()), x_(op_.input("x")), scratch_(Scratch::of(node)) {
    const LinearSpec& spec = node_.spec();
    padded_ = 64 * node_.sizes().chunks;
    rows_ = int32("N", 16 * node_.sizes().panels);
    arguments_.multiple = spec.odd_grid ? 2 : 1;
    arguments_.zero = spec.odd_grid ? (1 << spec.weight_bits) - 1 : 1 << (spec.weight_bits - 1);
    arguments_.blocks = int32("K / block_size", node_.sizes().blocks);
    arguments_.log_block = spec.block_size == 0 ? 30 : log2_of(spec.block_size);
    arguments_.gate = spec.gate == Gate::kNone ? 0 : spec.gate == Gate::kSilu ? 1 : 2;
    arguments_.has_bias = node.has_input("bias");
    int32("K", padded_);
  }

  void compute(const Run& run) const override {
    LinearArguments a = node_.arguments(run);
    if (a.M == 0) return;
    a.weight = on_device<std::uint8_t>(run, "weight");
    a.scales = on_device<std::uint16_t>(run, "scales");
    a.bias = on_device<float>(run, "bias");
    a.diagonal = on_device<float>(run, "diagonal");
    const LinearSpec& spec = node_.spec();
    Launcher launcher(run, *scratch_, x_);
    const Scratch::Cursor start = launcher.mark();
    const std::int64_t bytes = padded_ * (spec.hadamard_size != 0 ? 5 : 1);
    const std::int64_t batch = std::max(kScratchBytes / bytes / kRowBatch, std::int64_t{1}) * kRowBatch;
    for (std::int64_t row = 0; row < a.M; row += batch) {
      launcher.rewind(start);  // kernels on one stream run in order
      multiply(launcher, a, a.x + row * spec.K, a.y + row * spec.N, std::min(batch, a.M - row));
    }
  }

 private:
  // A constant where this call has it; when the node was made it was only checked. Null when the operator has no such input.
  template <class T>
  const T* on_device(const Run& run, const char* name) const {
    const int index = op_.input(name);
    return index < 0 ? nullptr : run.input(index).as<T>();
  }

  void multiply(Launcher& launcher, const LinearArguments& a, const float* x, float* y, std::int64_t M) const {
    const LinearSpec& spec = node_.spec();
    const Hadamard hadamard = {spec.hadamard_size, a.diagonal, spec.hadamard_interleave};
    if (spec.activation_bits == 16) {
      if (hadamard.size != 0) {
        auto* rotated = launcher.scratch<float>(M * spec.K);
        hadamard_rows(launcher, x, rotated, M, spec.K, hadamard);
        x = rotated;
      }
      multiply_floats(launcher, a, x, y, M);
      return;
    }
    const bool gemv = M <= kGemvRows, blocked = spec.block_size != 0;
    const Codes codes = quantize_rows(launcher, x, M, spec.K, padded_, spec.activation_bits, spec.activation_clip,
                                      gemv ? 0 : log_fields_of(spec.weight_bits), blocked && !gemv, hadamard);
    if (gemv) {
      multiply_few(launcher, a, codes, y, M);
    } else {
      multiply_many(launcher, a, codes, y, M, blocked);
    }
  }

  void multiply_few(Launcher& launcher, const LinearArguments& a, const Codes& codes, float* y, std::int64_t M) const {
    const Arguments& t = arguments_;
    launcher.launch("bdq_low_bit_gemv_bits" + std::to_string(node_.spec().weight_bits) + "_kg32", {M, ceil_div(rows_, 32)},
                    Pointer{codes.codes}, Pointer{codes.scales}, Pointer{codes.totals}, Pointer{a.weight}, Pointer{a.scales},
                    Pointer{a.bias}, Pointer{y}, N(), rows_, padded(), t.multiple, t.zero, t.blocks, t.log_block, t.gate, t.has_bias);
  }

  void multiply_many(Launcher& launcher, const LinearArguments& a, const Codes& codes, float* y, std::int64_t M, bool blocked) const {
    const Arguments& t = arguments_;
    const Tile tile = blocked ? Tile{64, 32} : M <= 64 ? Tile{64, 16} : Tile{128, 128};
    const std::int32_t zero = node_.spec().weight_bits == 8 ? 0 : t.zero;  // gemm.py takes 128 from 8-bit codes
    launcher.launch(gemm_name(node_.spec().weight_bits, tile, blocked), {ceil_div(M, tile.tokens), ceil_div(rows_, tile.rows)},
                    Pointer{codes.codes}, Pointer{codes.scales}, Pointer{codes.totals}, Pointer{codes.sums}, Pointer{a.weight},
                    Pointer{a.scales}, Pointer{a.bias}, Pointer{y}, int32("M", M), N(), rows_, padded(), t.multiple, zero, t.blocks,
                    t.log_block, t.gate, t.has_bias);
  }

  void multiply_floats(Launcher& launcher, const LinearArguments& a, const float* x, float* y, std::int64_t M) const {
    const Arguments& t = arguments_;
    const Tile tile = {64, 32};
    launcher.launch("bdq_float_gemm_bn" + std::to_string(tile.rows) + "_bm" + std::to_string(tile.tokens),
                    {ceil_div(M, tile.tokens), ceil_div(rows_, tile.rows)}, Pointer{x}, Pointer{a.weight}, Pointer{a.scales},
                    Pointer{a.bias}, Pointer{y}, int32("M", M), N(), rows_, static_cast<std::int32_t>(node_.spec().K), padded(),
                    std::int32_t{node_.spec().weight_bits}, t.multiple, t.zero, t.blocks, t.log_block, t.gate, t.has_bias);
  }

  std::int32_t N() const { return static_cast<std::int32_t>(node_.spec().N); }
  std::int32_t padded() const { return static_cast<std::int32_t>(padded_); }

  const LinearNode node_;
  const Operator& op_;
  const int x_;
  const std::shared_ptr<Scratch> scratch_;
  std::int64_t padded_ = 0;
  std::int32_t rows_ = 0;
  Arguments arguments_{};
};

}  // namespace

std::unique_ptr<Kernel> make_linear(const NodeInfo& node, Isa) { return std::make_unique<Linear>(node); }

}  // namespace bdq::cuda
