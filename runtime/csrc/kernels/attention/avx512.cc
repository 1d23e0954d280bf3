// Attention with AVX512.
#if defined(__x86_64__)

#include "vectors_avx512.h"

#include <cstring>

#include "../cache_rows.h"
#include "../rows.h"
#include "lanes.h"
#include "transpose_avx2.h"
#include "vector_tables.h"

namespace bdq::attention::avx512 {
namespace {

constexpr auto unpack_codes = cache_rows::unpack_avx2;

#include "functions_inl.h"
#include "many_lanes_inl.h"
#include "softmax_row_inl.h"
#include "few_lanes_inl.h"
#include "vector_kernels_inl.h"

}  // namespace bdq::attention::avx512

#endif
