// From partial results to the output.
#pragma once

#include "kernels.h"

namespace bdq::attention {

// Writes the output of the lanes of `block` from the partial results of its splits.
void finish(const Problem& problem, const Block& block, const Partial* partials, std::int64_t splits);

}  // namespace bdq::attention
