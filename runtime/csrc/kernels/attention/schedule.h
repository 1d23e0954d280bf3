// How a call is cut into blocks that threads can take one by one.
#pragma once

#include "kernels.h"

namespace bdq::attention {

// Lanes of every KV head in blocks, and where these are too few for the threads, their keys in `splits` ranges as well.
struct Schedule {
  std::int64_t lanes;   // of one block, at most
  std::int64_t blocks;  // of one KV head
  std::int64_t splits;  // of one block's keys
  std::int64_t items;   // in total
  int workers;          // threads that are worth it

  // Dearest first: later tokens see more keys. The splits of one block follow each other; one may be empty (key_begin >= key_end).
  Block block(const Problem& problem, std::int64_t item) const;
};

Schedule make_schedule(const Problem& problem, const Kernels& kernels, int threads);

}  // namespace bdq::attention
