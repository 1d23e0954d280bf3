// The linear operators: quantize the rows, then multiply, each in parallel. What one thread computes is in linear/.
#include "low_bit_linear.h"

#include <algorithm>
#include <cstring>

#include "linear/kernels.h"
#include "linear/scratch.h"
#include "rows.h"

namespace bdq {
namespace {

constexpr std::int64_t kRowBlock = 512;          // rows that share one decoded weight
constexpr std::int64_t kGroupSpan = 8;           // groups that share one block of rows while it is in the cache
constexpr std::int64_t kSerialBytes = 80 << 10;  // less weight than this is read sooner than another thread wakes up
constexpr std::int64_t kSerialValues = 48 << 10; // fewer activations than this are quantized sooner, too
constexpr std::int64_t kCodeBytes = 32 << 20;    // activations are quantized in batches of about so much

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// work(i) for i below count.
template <class Work>
void run_items(Parallel& parallel, std::int64_t count, Work&& work) {
  if (count == 1) return work(std::int64_t{0});
  parallel_for_allocating(parallel, static_cast<std::size_t>(count), [&](std::size_t i) { work(static_cast<std::int64_t>(i)); });
}

// Carves aligned arrays out of one buffer: first to add up the size, then to place them.
class Arena {
 public:
  explicit Arena(std::uint8_t* base) : base_(base) {}
  template <class T>
  T* take(std::int64_t count) {
    T* found = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return found;
  }
  std::size_t used() const { return used_; }

 private:
  std::uint8_t* base_;
  std::size_t used_ = 0;
};

struct Buffers {
  std::int8_t* codes = nullptr;
  float* scales = nullptr;
  std::int32_t* offsets = nullptr;
  float* floats = nullptr;
};

class Linear {
 public:
  Linear(const LinearSpec& spec, const LinearArguments& arguments, Isa isa, Parallel& parallel)
      : spec_(spec), in_(arguments), kernels_(linear_kernels(isa)), parallel_(parallel) {
    m_.spec = spec;
    m_.sizes = check_linear(spec);
    m_.weight = arguments.weight;
    m_.scales = arguments.scales;
    m_.bias = arguments.bias;
    m_.sum_count = m_.sizes.blocks;
    groups_ = ceil_div(m_.sizes.panels, 2);
  }

  void run() {
    const std::int64_t row_bytes = m_.padded_K() * (integer() ? 1 : 4);
    const std::int64_t batch = std::max(kCodeBytes / row_bytes / kRowBlock, std::int64_t{1}) * kRowBlock;
    for (std::int64_t row = 0; row < in_.M; row += batch) run_batch(row, std::min(batch, in_.M - row));
  }

 private:
  bool integer() const { return spec_.activation_bits != 16; }
  // Floats are multiplied where they are, unless they are transformed or their rows end within a chunk.
  bool in_place() const { return !integer() && spec_.hadamard_size == 0 && spec_.K % kChunk == 0; }

  void run_batch(std::int64_t first, std::int64_t rows) {
    m_.y = in_.y + first * spec_.N;
    m_.a.M = rows;
    m_.a.row_tile = rows <= kGemvRows ? 1 : kRowTile;
    Buffers to;
    Arena measure(nullptr);
    place(measure, rows, &to);
    const Scratch memory(Scratch::kActivations, measure.used());
    Arena arena(memory.data());
    place(arena, rows, &to);
    m_.a.codes = to.codes;
    m_.a.scales = to.scales;
    m_.a.offsets = to.offsets;
    m_.a.floats = in_place() ? in_.x + first * spec_.K : to.floats;
    m_.a.float_stride = m_.padded_K();
    if (!in_place()) prepare_rows(in_.x + first * spec_.K, rows, to);
    multiply(rows);
  }

  void place(Arena& arena, std::int64_t rows, Buffers* to) const {
    const std::int64_t padded_rows = ceil_div(rows, m_.a.row_tile) * m_.a.row_tile;
    if (integer()) {
      to->codes = arena.take<std::int8_t>(padded_rows * m_.padded_K());
      to->scales = arena.take<float>(padded_rows);
      to->offsets = arena.take<std::int32_t>(padded_rows * m_.sum_count);
    } else if (!in_place()) {
      to->floats = arena.take<float>(rows * m_.padded_K());
    }
  }

  void prepare_rows(const float* x, std::int64_t rows, const Buffers& to) {
    const bool serial = rows * m_.padded_K() < kSerialValues;
    const std::int64_t items = serial ? 1 : std::min<std::int64_t>(rows, 4 * parallel_.threads());
    run_items(parallel_, items, [&](std::int64_t i) {
      const Scratch row(Scratch::kMultiply, static_cast<std::size_t>(m_.padded_K()) * sizeof(float));
      auto* rotated = reinterpret_cast<float*>(row.data());
      for (std::int64_t r = rows * i / items; r < rows * (i + 1) / items; ++r) prepare_row(x + r * spec_.K, r, to, rotated);
    });
    if (!integer()) return;
    const std::int64_t padded_rows = ceil_div(rows, m_.a.row_tile) * m_.a.row_tile;
    for (std::int64_t r = rows; r < padded_rows; ++r) {  // tiles read them
      std::int8_t* codes = const_cast<std::int8_t*>(m_.codes(r));
      for (std::int64_t c = 0; c < m_.sizes.chunks; ++c) std::memset(codes + c * m_.a.row_tile * kChunk, 0, kChunk);
      to.scales[r] = 0.0f;
      std::fill_n(to.offsets + r * m_.sum_count, m_.sum_count, 0);
    }
  }

  void prepare_row(const float* x, std::int64_t r, const Buffers& to, float* rotated) const {
    float* floats = integer() ? rotated : to.floats + r * m_.padded_K();
    if (spec_.hadamard_size != 0) {
      if (spec_.hadamard_interleave > 1) {
        interleave_row(x, floats, spec_.K, spec_.hadamard_interleave);
        x = floats;
      }
      kernels_.hadamard(x, in_.diagonal, floats, spec_.K, spec_.hadamard_size);
      x = floats;
    }
    if (!integer()) {
      if (x != floats) std::memcpy(floats, x, static_cast<std::size_t>(spec_.K) * sizeof(float));
      std::fill(floats + spec_.K, floats + m_.padded_K(), 0.0f);
      return;
    }
    RowTarget target;
    target.codes = const_cast<std::int8_t*>(m_.codes(r));
    target.chunk_stride = m_.a.row_tile * kChunk;
    target.sums = to.offsets + r * m_.sum_count;
    target.sum_count = m_.sum_count;
    target.sum_columns = spec_.block_size == 0 ? m_.padded_K() : spec_.block_size;
    to.scales[r] = kernels_.quantize(x, spec_.K, m_.padded_K(), spec_.activation_bits, spec_.activation_clip, target);
    for (std::int64_t b = 0; b < m_.sum_count; ++b) target.sums[b] *= -m_.zero_point();
  }

  void multiply(std::int64_t rows) {
    const std::int64_t threads = parallel_.threads();
    const std::int64_t row_blocks = ceil_div(rows, kRowBlock);
    const std::int64_t rows_each = ceil_div(ceil_div(rows, row_blocks), 2 * kRowTile) * 2 * kRowTile;
    std::int64_t spans = groups_;
    if (m_.sizes.weight_bytes * std::min<std::int64_t>(rows, 16) < kSerialBytes) {
      spans = 1;
    } else if (rows <= kGemvRows) {
      spans = std::min(groups_, m_.sizes.weight_bytes < (4 << 20) ? threads : 4 * threads);
    } else {
      const std::int64_t span = std::clamp<std::int64_t>(groups_ * row_blocks / (4 * threads), 1, kGroupSpan);
      spans = ceil_div(groups_, span);
    }
    const std::size_t scratch = kernels_.scratch_bytes(m_, std::min(rows, rows_each));
    run_items(parallel_, row_blocks * spans, [&](std::int64_t i) {
      const std::int64_t block = i / spans, span = i % spans;
      const std::int64_t row_begin = block * rows_each, row_end = std::min(rows, row_begin + rows_each);
      if (row_begin >= row_end) return;
      const Scratch memory(Scratch::kMultiply, scratch);
      kernels_.multiply(m_, row_begin, row_end, groups_ * span / spans, groups_ * (span + 1) / spans, memory.data());
    });
  }

  const LinearSpec& spec_;
  const LinearArguments& in_;
  const LinearKernels& kernels_;
  Parallel& parallel_;
  Multiplication m_;
  std::int64_t groups_ = 0;
};

}  // namespace

void low_bit_linear(const LinearSpec& spec, const LinearArguments& arguments, Isa isa, Parallel& parallel) {
  Linear(spec, arguments, isa, parallel).run();
}

}  // namespace bdq
