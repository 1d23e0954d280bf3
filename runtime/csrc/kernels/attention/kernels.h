// What an instruction set brings to attention: one table each.
#pragma once

#include <cstddef>

#include "problem.h"

namespace bdq::attention {

// Lanes first .. first + count - 1 of one KV head against its keys key_begin .. key_end - 1.
struct Block {
  std::int64_t batch, kv_head;
  std::int64_t first, count;
  std::int64_t key_begin, key_end;
};

// Of each lane, over the keys of a block that it sees, with z their logits times log2(e): m = max z (at most -1e30 where it sees none),
// l = Σ 2^(z - m), o = Σ 2^(z - m) v. Blocks of the same lanes are put together with these three.
struct Partial {
  float* o;  // [count, head_size]
  float* m;  // [count]
  float* l;  // [count]
};

struct Kernels {
  // x1 cos - x2 sin, x2 cos + x1 sin; y may be x.
  void (*rotate)(const float* x, const float* cos, const float* sin, float* y, std::int64_t half);
  // Lanes of a block at most, for a call with many of them.
  std::int64_t (*block_lanes)(const Problem& problem);
  // Bytes of scratch, aligned to 64, that `attend` wants for `lanes` lanes.
  std::size_t (*scratch_bytes)(const Problem& problem, std::int64_t lanes);
  void (*attend)(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch);
};

const Kernels& kernels_for(Isa isa);

// RoPE and Hadamard of one head of the token at `position`, as the attributes ask; y [head_size].
void prepare_head(const Problem& problem, const Kernels& kernels, const float* x, std::int64_t position, float* y);

extern const Kernels kScalarKernels;

}  // namespace bdq::attention
