#if defined(__x86_64__)

#include "amx_tiles.h"

namespace bdq::attention::amx {

#define BDQ_EACH(X) X(0) X(1) X(2) X(3)

BDQ_TILES void multiply_keys(const Half* keys, const Half* queries, std::int64_t chunks, std::int64_t begin, std::int64_t end,
                             float* logits) {
  tile_fence();
#define BDQ_ZERO(T) _tile_zero(T);
  BDQ_EACH(BDQ_ZERO)
#undef BDQ_ZERO
  for (std::int64_t c = 0; c < chunks; ++c, keys += kKeyTiles * kTile, queries += kQueryParts * kTile) {
    _tile_loadd(4, queries, 64);
    _tile_loadd(5, queries + kTile, 64);
    _tile_loadd(6, queries + 2 * kTile, 64);
#define BDQ_KEYS(T)                       \
  if (begin <= T && T < end) {            \
    _tile_loadd(7, keys + T * kTile, 64); \
    _tile_dpbf16ps(T, 7, 4);              \
    _tile_dpbf16ps(T, 7, 5);              \
    _tile_dpbf16ps(T, 7, 6);              \
  }
    BDQ_EACH(BDQ_KEYS)
#undef BDQ_KEYS
  }
#define BDQ_STORE(T) \
  if (begin <= T && T < end) _tile_stored(T, logits + T * kRows * kRows, 64);
  BDQ_EACH(BDQ_STORE)
#undef BDQ_STORE
  tile_fence();
}

BDQ_TILES void multiply_values(const Half* values, const Half* weights, std::int64_t tiles, std::int64_t begin, std::int64_t end,
                               float* o) {
  tile_fence();
  for (std::int64_t first = 0; first < tiles; first += 4, o += 4 * kRows * kRows, values += 4 * kKeyChunks * kTile) {
    const std::int64_t count = tiles - first;
#define BDQ_LOAD(T) \
  if (T < count) _tile_loadd(T, o + T * kRows * kRows, 64);
    BDQ_EACH(BDQ_LOAD)
#undef BDQ_LOAD
    for (std::int64_t c = begin; c < end; ++c) {
      const Half* parts = weights + c * kWeightParts * kTile;
      _tile_loadd(4, parts, 64);
      _tile_loadd(5, parts + kTile, 64);
      _tile_loadd(6, parts + 2 * kTile, 64);
#define BDQ_VALUES(T)                                          \
  if (T < count) {                                             \
    _tile_loadd(7, values + (T * kKeyChunks + c) * kTile, 64); \
    _tile_dpbf16ps(T, 7, 4);                                   \
    _tile_dpbf16ps(T, 7, 5);                                   \
    _tile_dpbf16ps(T, 7, 6);                                   \
  }
      BDQ_EACH(BDQ_VALUES)
#undef BDQ_VALUES
    }
#define BDQ_STORE(T) \
  if (T < count) _tile_stored(T, o + T * kRows * kRows, 64);
    BDQ_EACH(BDQ_STORE)
#undef BDQ_STORE
  }
  tile_fence();
}

BDQ_TILES void multiply_few_keys(const Half* keys, const Half* queries, std::int64_t chunks, std::int64_t end, float* dots) {
  tile_fence();
#define BDQ_ZERO(T) _tile_zero(T);
  BDQ_EACH(BDQ_ZERO)
  for (std::int64_t c = 0; c < chunks; ++c, keys += kKeyTiles * kTile) {
    _tile_loadd(4, queries + c * kTile, 64);
#define BDQ_KEYS(T)                       \
  if (T < end) {                          \
    _tile_loadd(5, keys + T * kTile, 64); \
    _tile_dpbf16ps(T, 5, 4);              \
  }
    BDQ_EACH(BDQ_KEYS)
#undef BDQ_KEYS
  }
#define BDQ_STORE(T) \
  if (T < end) _tile_stored(T, dots + T * kRows * kRows, 64);
  BDQ_EACH(BDQ_STORE)
#undef BDQ_STORE
  tile_fence();
}

BDQ_TILES void multiply_few_values(const Half* weights, const Half* values, std::int64_t tiles, std::int64_t end, float* sums) {
  tile_fence();
  for (std::int64_t first = 0; first < tiles; first += 4, sums += 4 * kRows * kRows) {
    const std::int64_t count = tiles - first;
    BDQ_EACH(BDQ_ZERO)
    for (std::int64_t c = 0; c < end; ++c) {
      _tile_loadd(4, weights + c * kTile, 64);
#define BDQ_VALUES(T)                                             \
  if (T < count) {                                                \
    _tile_loadd(5, values + (c * tiles + first + T) * kTile, 64); \
    _tile_dpbf16ps(T, 4, 5);                                      \
  }
      BDQ_EACH(BDQ_VALUES)
#undef BDQ_VALUES
    }
#define BDQ_STORE(T) \
  if (T < count) _tile_stored(T, sums + T * kRows * kRows, 64);
    BDQ_EACH(BDQ_STORE)
#undef BDQ_STORE
  }
#undef BDQ_ZERO
  tile_fence();
}

}  // namespace bdq::attention::amx

#endif
