// The cache of a call: what past had, and the new tokens behind it.
#pragma once

#include "kernels.h"

namespace bdq::attention {

// Positions of one KV head that are not new tokens: what past has there, 0 beyond it. Nothing to do where present is past.
void copy_past(const Problem& problem, std::int64_t b, std::int64_t kv_head);

// Quantizes keys and values of new tokens first .. last - 1 into present.
void append_tokens(const Problem& problem, const Kernels& kernels, std::int64_t b, std::int64_t kv_head, std::int64_t first,
                   std::int64_t last);

}  // namespace bdq::attention
