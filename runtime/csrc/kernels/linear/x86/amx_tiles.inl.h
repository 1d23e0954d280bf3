// Tiles: 0 to 3 accumulate 32 rows by 32 channels, 4 and 5 hold activations, 6 and 7 codes. Included in the anonymous namespace of
// a file that has set its target.

constexpr std::int64_t kAmxChunks = 10;      // of two panels: 20 KiB beside the activations that stream through
constexpr std::int64_t kAmxBlockChunks = 8;  // a multiple of the largest block

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 rows by `panels` panels, two such tiles where `tall`; chunks [0, chunks) of a (1024 bytes a tile) and w. The
// second 16 rows are `tile` bytes after the first.
template <bool tall, int panels>
inline void tile_chunks(const std::int8_t* a, std::int64_t tile, const std::uint8_t* w, std::int64_t stride, std::int64_t chunks) {
  const std::int8_t* below = a + tile;
  for (std::int64_t c = 0; c < chunks; ++c, a += 1024, below += 1024, w += 1024) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (panels == 2) {
      _tile_loadd(7, w + stride, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (tall) {
      _tile_loadd(5, below, 64);
      _tile_dpbsud(2, 5, 6);
      if constexpr (panels == 2) _tile_dpbsud(3, 5, 7);
    }
  }
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

constexpr int kRowBytes = 32 * sizeof(std::int32_t);

template <bool tall, int panels> inline void load_tiles(const std::int32_t* out) {
  _tile_loadd(0, out, kRowBytes);
  if constexpr (panels == 2) _tile_loadd(1, out + 16, kRowBytes);
  if constexpr (tall) _tile_loadd(2, out + 16 * 32, kRowBytes);
  if constexpr (tall && panels == 2) _tile_loadd(3, out + 16 * 32 + 16, kRowBytes);
}

template <bool tall, int panels> inline void store_tiles(std::int32_t* out) {
  _tile_stored(0, out, kRowBytes);
  if constexpr (panels == 2) _tile_stored(1, out + 16, kRowBytes);
  if constexpr (tall) _tile_stored(2, out + 16 * 32, kRowBytes);
  if constexpr (tall && panels == 2) _tile_stored(3, out + 16 * 32 + 16, kRowBytes);
}

template <bool tall, int panels> void amx_channels(const Multiplication& m, const Part& part, std::int64_t row, std::int32_t* out) {
  const std::int8_t* a = m.codes(row) + part.first * 1024;
  part.start ? zero_tiles() : load_tiles<tall, panels>(out);
  tile_chunks<tall, panels>(a, 16 * m.padded_K(), part.codes, part.chunks * 1024, part.chunks);
  store_tiles<tall, panels>(out);
}

template <bool tall, int panels> void amx_blocks(const Multiplication& m, const Part& part, std::int64_t row, std::int64_t rows,
                                                 std::int32_t* out) {
  alignas(64) std::int32_t exact[32 * 32];
  const std::int64_t block = m.spec.block_size / kChunk, before = part.first / block;
  const std::int8_t* a = m.codes(row) + part.first * 1024;
  auto* sums = reinterpret_cast<float*>(out);
  for (std::int64_t b = 0, c = 0; c < part.chunks; ++b, c += block) {
    zero_tiles();
    const std::int64_t chunks = block < part.chunks - c ? block : part.chunks - c;
    tile_chunks<tall, panels>(a + c * 1024, 16 * m.padded_K(), part.codes + c * 1024, part.chunks * 1024, chunks);
    store_tiles<tall, panels>(exact);
    const __m512 scale[2] = {_mm512_loadu_ps(part.scales + b * 32), _mm512_loadu_ps(part.scales + b * 32 + 16)};
    for (std::int64_t i = 0; i < rows; ++i) {
      const __m512i offset = _mm512_set1_epi32(m.a.offsets[(row + i) * m.sum_count + before + b]);
      for (int p = 0; p < panels; ++p) {
        float* sum = sums + i * 32 + p * 16;
        const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(exact + i * 32 + p * 16), offset));
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, scale[p], part.start && b == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sum)));
      }
    }
  }
}

template <bool tall, int panels>
inline void amx_tile(const Multiplication& m, const Part& part, std::int64_t row, std::int64_t rows, std::int32_t* out) {
  m.spec.block_size == 0 ? amx_channels<tall, panels>(m, part, row, out) : amx_blocks<tall, panels>(m, part, row, rows, out);
}

// Up to 32 rows.
void rows_by_tiles(const Multiplication& m, const Part& part, std::int64_t row, std::int64_t end, std::int32_t* out) {
  const std::int64_t rows = end - row;
  __asm__ volatile("" ::: "memory");  // gcc does not know that tile loads read memory
  if (rows > 16) {
    part.panels == 2 ? amx_tile<true, 2>(m, part, row, rows, out) : amx_tile<true, 1>(m, part, row, rows, out);
  } else {
    part.panels == 2 ? amx_tile<false, 2>(m, part, row, rows, out) : amx_tile<false, 1>(m, part, row, rows, out);
  }
}

void multiply_amx(const Multiplication& m, std::int64_t begin, std::int64_t end, std::int64_t group_begin, std::int64_t group_end,
                  std::uint8_t* scratch) {
  // Half a tile of columns in a block of 32 is no faster than vectors.
  const bool tiles = m.a.M > kGemvRows && m.spec.activation_bits != 16 && m.spec.block_size != 32;
  if (!tiles) return multiply<Vector512, VnniDot>(m, begin, end, group_begin, group_end, scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  in_spans(m, group_begin, group_end, [&](std::int64_t from, std::int64_t to) {
    multiply_many<Vector512>(
        m, begin, end, from, to, scratch, m.spec.block_size == 0 ? kAmxChunks : kAmxBlockChunks, [](const Part&) {},
        [&](const Part& part, std::int64_t row, std::int64_t last, std::int32_t* out) { rows_by_tiles(m, part, row, last, out); });
  });
  _tile_release();
}
