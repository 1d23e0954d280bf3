// KVAttention and its variants on the GPU: cache.py, then attention.py.
#include "../ort/attention_node.h"

#include <algorithm>

#include "../kernels/attention/check.h"
#include "kernels.h"
#include "rows.h"

namespace bdq::cuda {
namespace {

constexpr std::int64_t kMaxHeadSize = 256;
constexpr std::int64_t kFewRows = 16;      // rows (a token and a head of a group) of a block in decoding
constexpr std::int64_t kPartKeys = 256;    // a part of the text that is worth a block of its own
constexpr std::int64_t kMaxParts = 32;
constexpr std::int64_t kEnoughBlocks = 256;  // that keep a GPU busy without parts

// The images for a head size: a tile's width, the keys of a step when rows are few, and the rows of a block when they are many, which
// takes 32 keys at a time.
struct Width {
  int channels, keys, rows;
};

Width width_of(std::int64_t head_size) {
  if (head_size <= 64) return {64, 64, 64};
  if (head_size <= 128) return {128, 32, 64};
  return {256, 32, 16};
}

class Attention final : public Kernel {
 public:
  explicit Attention(const NodeInfo& node)
      : node_(node), cos_(node.op().input("cos_cache")), scratch_(Scratch::of(node)), width_(width_of(node_.spec().head_size)) {
    if (node_.spec().head_size > kMaxHeadSize)
      throw std::invalid_argument("head_size is " + std::to_string(node_.spec().head_size) +
                                  ", the CUDA kernels take at most 256; run the model on the CPU");
  }

  void compute(const Run& run) const override {
    const AttentionSpec& spec = node_.spec();
    AttentionArguments a = node_.arguments(run);
    if (a.batch == 0) return;
    if (cos_ >= 0) {  // where this call has them, constant or not
      a.cos_cache = run.input(cos_).as<float>();
      a.sin_cache = run.input(cos_ + 1).as<float>();
    }
    attention::check_arguments(attention::Problem(spec, a, Isa::kScalar));
    Launcher launcher(run, *scratch_, 0);
    move(launcher, a.past_key, a.present_key, a, cache_row_bytes(spec.head_size, spec.key_bits));
    move(launcher, a.past_value, a.present_value, a, cache_row_bytes(spec.head_size, spec.value_bits));
    const Queries queries = {launcher.scratch<std::uint16_t>(a.batch * a.tokens * spec.num_heads * spec.head_size),
                             launcher.scratch<std::uint16_t>(a.batch * a.tokens * spec.num_heads * spec.head_size),
                             launcher.scratch<float>(2 * a.batch * a.tokens * spec.num_heads)};
    const std::int32_t* seqlens = launcher.upload(a.seqlens_k, a.batch);
    append(launcher, a, queries, seqlens);
    attend(launcher, a, queries, seqlens);
  }

 private:
  // Two float16 of each query, and two factors of each row.
  struct Queries {
    std::uint16_t *high, *low;
    float* factors;
  };

  std::string sized(const char* name) const { return name + std::to_string(width_.channels); }

  void move(Launcher& launcher, const std::uint8_t* past, std::uint8_t* present, const AttentionArguments& a, std::int64_t row) const {
    if (past == present) return;
    const bool words = row % 4 == 0;
    const std::int64_t unit = words ? 4 : 1, block = words ? 1024 : 2048;
    const std::int64_t from = a.past_positions * row / unit, to = a.present_positions * row / unit;
    launcher.launch(words ? "bdq_move_cache_block1024_words1" : "bdq_move_cache_block2048_words0",
                    {ceil_div(to, block), a.batch * node_.spec().kv_num_heads}, Pointer{past}, Pointer{present}, from, to);
  }

  void append(Launcher& launcher, const AttentionArguments& a, const Queries& queries, const std::int32_t* seqlens) const {
    const AttentionSpec& spec = node_.spec();
    HadamardConstants hadamard{};
    if (spec.hadamard) hadamard = hadamard_constants(spec.head_size);
    launcher.launch(sized("bdq_attention_rows_bd"), {a.tokens, spec.num_heads + 2 * spec.kv_num_heads, a.batch}, Pointer{a.query},
                    Pointer{a.key}, Pointer{a.value}, Pointer{seqlens}, Pointer{a.cos_cache}, Pointer{a.sin_cache}, Pointer{queries.high},
                    Pointer{queries.low}, Pointer{queries.factors}, Pointer{a.present_key}, Pointer{a.present_value},
                    int32("the row of a query", a.query_stride), int32("the row of a key", a.key_stride),
                    int32("the row of a value", a.value_stride), int32("the number of tokens", a.tokens), total(a), positions(a),
                    heads(), kv_heads(), head_size(), static_cast<std::int32_t>(a.rotary_dim / 2), hadamard.log_n, hadamard.grid,
                    hadamard.root, std::int32_t{spec.key_bits}, std::int32_t{spec.value_bits}, spec.key_clip, spec.value_clip, spec.scale);
  }

  void attend(Launcher& launcher, const AttentionArguments& a, const Queries& queries, const std::int32_t* seqlens) const {
    const AttentionSpec& spec = node_.spec();
    const std::int64_t rows = a.tokens * (spec.num_heads / spec.kv_num_heads);
    const std::int64_t tile = rows <= kFewRows ? kFewRows : width_.rows, keys = rows <= kFewRows ? width_.keys : 32;
    const std::int64_t blocks = ceil_div(rows, tile) * a.batch * spec.kv_num_heads, parts = parts_of(a, blocks);
    const std::int64_t outputs = a.batch * a.tokens * spec.num_heads;
    const float* partial = parts > 1 ? launcher.scratch<float>(outputs * parts * spec.head_size) : nullptr;
    const float* weights = parts > 1 ? launcher.scratch<float>(outputs * parts * 2) : nullptr;
    const std::int32_t window = static_cast<std::int32_t>(std::clamp<std::int64_t>(spec.local_window_size, -1, 0x3FFFFFFF));
    launcher.launch(sized("bdq_cached_attention_bd") + "_bm" + std::to_string(tile) + "_bn" + std::to_string(keys),
                    {ceil_div(rows, tile), a.batch * spec.kv_num_heads, parts}, Pointer{queries.high}, Pointer{queries.low},
                    Pointer{queries.factors}, Pointer{a.present_key}, Pointer{a.present_value}, Pointer{seqlens}, Pointer{a.output},
                    Pointer{partial}, Pointer{weights}, static_cast<std::int32_t>(a.tokens), total(a), positions(a), heads(), kv_heads(),
                    head_size(), std::int32_t{spec.key_bits}, std::int32_t{spec.value_bits}, spec.softcap, window,
                    static_cast<std::int32_t>(parts));
    if (parts == 1) return;
    launcher.launch("bdq_combine_parts_parts32", {outputs}, Pointer{partial}, Pointer{weights}, Pointer{a.output}, head_size(),
                    static_cast<std::int32_t>(parts));
  }

  // Parts of the text, so that few rows still make enough blocks.
  std::int64_t parts_of(const AttentionArguments& a, std::int64_t blocks) const {
    const std::int64_t window = node_.spec().local_window_size;
    const std::int64_t length = window > 0 ? std::min(window + a.tokens, a.total_sequence_length) : a.total_sequence_length;
    return std::clamp<std::int64_t>(std::min(length / kPartKeys, kEnoughBlocks / blocks), 1, kMaxParts);
  }

  std::int32_t total(const AttentionArguments& a) const { return static_cast<std::int32_t>(a.total_sequence_length); }
  std::int32_t positions(const AttentionArguments& a) const { return int32("the number of positions", a.present_positions); }
  std::int32_t heads() const { return static_cast<std::int32_t>(node_.spec().num_heads); }
  std::int32_t kv_heads() const { return static_cast<std::int32_t>(node_.spec().kv_num_heads); }
  std::int32_t head_size() const { return static_cast<std::int32_t>(node_.spec().head_size); }

  const AttentionNode node_;
  const int cos_;
  const std::shared_ptr<Scratch> scratch_;
  const Width width_;
};

}  // namespace

std::unique_ptr<Kernel> make_attention(const NodeInfo& node, Isa) { return std::make_unique<Attention>(node); }

}  // namespace bdq::cuda
