// Attention with NEON.
#if defined(__aarch64__)

#include "vectors_neon.h"

#include <cstring>

#include "../cache_rows.h"
#include "../rows.h"
#include "lanes.h"
#include "transpose_neon.h"
#include "vector_tables.h"

namespace bdq::attention::neon {
namespace {

constexpr auto unpack_codes = cache_rows::unpack_neon;

#include "functions_inl.h"
#include "many_lanes_inl.h"
#include "softmax_row_inl.h"
#include "few_lanes_inl.h"
#include "vector_kernels_inl.h"

}  // namespace bdq::attention::neon

#endif
