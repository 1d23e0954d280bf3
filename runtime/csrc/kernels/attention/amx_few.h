// Attention of few lanes (one new token) with AMX.
#pragma once

#include "kernels.h"

namespace bdq::attention::amx {

constexpr std::int64_t kFewLanes = 15;  // more are cheaper as columns of tiles

void attend_few(const Problem& problem, const Block& block, const Partial& partial, std::byte* scratch);
std::size_t few_scratch_bytes(const Problem& problem, std::int64_t lanes);

}  // namespace bdq::attention::amx
