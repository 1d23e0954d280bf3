// All of linear/x86 that does not depend on how dot products are computed. Included in the anonymous namespace of a file that has
// set its target, so that each instruction set has its own copy and no other file links to it.

constexpr std::int64_t kPrefetch = 2048;  // bytes ahead in the stream of one panel

template <int n> struct Count {
  static constexpr int value = n;
};

#if defined(__SANITIZE_ADDRESS__)
#define BDQ_INLINE  // gcc 12 takes minutes to inline what it instruments
#else
#define BDQ_INLINE __attribute__((always_inline))
#endif

// f(Count<0>{}), ..., f(Count<n - 1>{}): an array indexed by them is registers. gcc unrolls loops too late for that.
template <int n, int i = 0, class F> BDQ_INLINE inline void each(const F& f) {
  if constexpr (i < n) {
    f(Count<i>{});
    each<n, i + 1>(f);
  }
}

// f(i, v) for all i below n and v below m.
template <int n, int m, class F> BDQ_INLINE inline void each_pair(const F& f) {
  each<n>([&](auto i) BDQ_INLINE { each<m>([&](auto v) BDQ_INLINE { f(i, v); }); });
}

#include "decode.inl.h"
#include "finish.inl.h"
#include "gemm.inl.h"
#include "gemv.inl.h"
#include "real.inl.h"
#include "rows.inl.h"
#include "table.inl.h"
