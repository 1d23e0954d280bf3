// All of linear/x86 that does not depend on how dot products are computed. Included in the anonymous namespace of a file that has
// set its target, so that each instruction set has its own copy and no other file links to it.

constexpr std::int64_t kPrefetch = 2048;  // bytes ahead in the stream of one panel

template <int n> struct Count {
  static constexpr int value = n;
};

#include "decode.inl.h"
#include "finish.inl.h"
#include "gemm.inl.h"
#include "gemv.inl.h"
#include "real.inl.h"
#include "rows.inl.h"
#include "table.inl.h"
