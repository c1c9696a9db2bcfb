// Quantised linear: int8 activations times the codes of a row, group by group ascending.
//
// The text before this one defines K, COLUMNS (output columns), STREAMS (1, or 2 when row n of the
// second half of the matrix belongs to row n of the first), BITS, GROUP, LOW, SPAN, HEADER,
// GROUP_BYTES (of a row), Scale, MINIMUMS, Minimum, SUPER_SCALE, SUPER_MINIMUM, ZERO_POINT,
// num_tokens(n), x_row(n, p, t), weight(n, p) and epilogue(n, p, i0, begin, end, sum0, sum1).
//
// A block is 16 rows: K / SPAN super-blocks of [HEADER][codes, scales, minimums of each group],
// every field of the 16 rows side by side.

constexpr int BLOCK = 16;
constexpr int VECTORS = BLOCK / VL;
constexpr int STEP = GROUP < 32 ? GROUP : 32;        // values under one float operation
constexpr int UNITS = STEP / 4;
constexpr int64_t CODE_BYTES = GROUP * BITS / 8 * BLOCK;
constexpr int64_t SPAN_BYTES = HEADER * BLOCK + SPAN / GROUP * GROUP_BYTES * BLOCK;
constexpr int64_t BLOCK_BYTES = K / SPAN * SPAN_BYTES;
constexpr int TILE = VL == 16 ? 12 : VL == 8 ? 4 : 2;  // tokens of a full tile
constexpr int ITEM = 2;                              // blocks of a work item
constexpr int64_t NUM_BLOCKS = (COLUMNS + BLOCK - 1) / BLOCK;
constexpr int64_t ITEMS_N = (NUM_BLOCKS + ITEM - 1) / ITEM;
// Quantised tokens stay in the core's L2 (at most 384 KiB) while the weights of a panel pass by.
constexpr int64_t FITTING = 393216 / (K * TILE * 2);
constexpr int64_t CHUNK_TILES = FITTING > 1 ? FITTING : 1;

// A tile of tokens, token fastest.
struct Tile {
  alignas(64) int32_t codes[K / 4 * TILE];       // [K / 4][width] four signed bytes
  float scales[K / 32 * TILE];                   // [K / 32][width]
  int32_t offsets[K / STEP * TILE];              // [K / STEP][width] what dot products begin with
  float sums[MINIMUMS ? K / STEP * TILE : 1];    // [K / STEP][width] sum of the group's values
};

// Tokens -> tiles of TILE -> chunks of at most CHUNK_TILES tiles, as equal as can be.
struct Chunks {
  int64_t tokens, tiles, chunks;
  explicit Chunks(int64_t t)
      : tokens(t), tiles((t + TILE - 1) / TILE), chunks((tiles + CHUNK_TILES - 1) / CHUNK_TILES) {}
  int64_t first_tile(int64_t chunk) const { return tiles * chunk / chunks; }
  int64_t tokens_of(int64_t tile) const {
    return tokens - tile * TILE < TILE ? tokens - tile * TILE : TILE;
  }
};

// The narrowest kernel for so many tokens; the lanes beyond them compute on zeros.
AIOS_INLINE int width_of(int64_t tokens) {
  for (int width = 1; width < TILE; width *= 2)
    if (tokens <= width) return width;
  return TILE;
}

AIOS_NOINLINE void quantize(const Sizes* n, void* const* p, int64_t first, int64_t count,
                            Tile& out) {
  const int width = width_of(count);
  for (int64_t t = 0; t < count; ++t) {
    const float* row = x_row(n, p, first + t);
    for (int64_t g = 0; g < K / 32; ++g) {
      alignas(64) int8_t codes[32];
      int32_t sums[2], *at = out.codes + g * 8 * width + t;
      const float scale = quantize32(row + g * 32, codes, sums);
      for (int i = 0; i < 8; ++i) memcpy(at + i * width, codes + 4 * i, 4);
      if (STEP == 32) sums[0] += sums[1];
      out.scales[g * width + t] = scale;
      for (int i = 0; i < 32 / STEP; ++i) {
        const int64_t step = (g * (32 / STEP) + i) * width + t;
        out.offsets[step] = offset_of<BITS>(LOW) * sums[i];
        if (MINIMUMS) out.sums[step] = scale * (float)sums[i];
      }
    }
  }
  for (int64_t t = count; t < width; ++t) {
    for (int64_t i = 0; i < K / 4; ++i) out.codes[i * width + t] = 0;
    for (int64_t i = 0; i < K / 32; ++i) out.scales[i * width + t] = 0.0f;
    for (int64_t i = 0; i < K / STEP; ++i) out.offsets[i * width + t] = 0;
    for (int64_t i = 0; MINIMUMS && i < K / STEP; ++i) out.sums[i * width + t] = 0.0f;
  }
}

// The scales and minimums of group `g` of BLOCKS blocks.
template <int BLOCKS>
AIOS_INLINE void scales_of(const uint8_t* w, int64_t g, vf (&scale)[BLOCKS * VECTORS],
                           vf (&minimum)[BLOCKS * VECTORS]) {
  constexpr int64_t PER_SPAN = SPAN / GROUP;
  AIOS_LOOP (int r = 0; r < BLOCKS * VECTORS; ++r) {
    const int lane = r % VECTORS * VL;
    const uint8_t* span = w + r / VECTORS * BLOCK_BYTES + g / PER_SPAN * SPAN_BYTES;
    const uint8_t* end = span + HEADER * BLOCK + g % PER_SPAN * GROUP_BYTES * BLOCK + CODE_BYTES;
    scale[r] = scales_at((const Scale*)end + lane);
    if (SUPER_SCALE) scale[r] *= scales_at((const f16*)span + lane);
    if constexpr (MINIMUMS) {
      minimum[r] = scales_at((const Minimum*)(end + BLOCK * sizeof(Scale)) + lane);
      if (SUPER_MINIMUM) minimum[r] *= scales_at((const f16*)span + SUPER_SCALE * BLOCK + lane);
      if (ZERO_POINT) minimum[r] *= scale[r];
    }
  }
}

// sums[WIDTH][BLOCKS * 16] of a tile of tokens and BLOCKS consecutive blocks at w.
template <int BLOCKS, int WIDTH>
AIOS_NOINLINE void tile(const uint8_t* w, const Tile& x, float* out) {
  constexpr int ROWS = BLOCKS * VECTORS;
  vf acc[WIDTH][ROWS] = {};
  for (int64_t g = 0; g < K / GROUP; ++g) {
    const int64_t begin = g / (SPAN / GROUP) * SPAN_BYTES + HEADER * BLOCK +
                          g % (SPAN / GROUP) * GROUP_BYTES * BLOCK;
    const uint8_t* groups[BLOCKS];
    AIOS_LOOP (int b = 0; b < BLOCKS; ++b) {
      groups[b] = w + b * BLOCK_BYTES + begin;
      // Into L2, the blocks that come after these: the hardware's prefetch loses its way there.
      AIOS_LOOP (int line = 0; line < GROUP_BYTES * BLOCK; line += 64)
        __builtin_prefetch(groups[b] + BLOCKS * BLOCK_BYTES + line, 0, 2);
    }
    vf scale[ROWS], minimum[ROWS];
    scales_of<BLOCKS>(w, g, scale, minimum);
    AIOS_LOOP (int s = 0; s < GROUP / STEP; ++s) {
      const int64_t step = g * (GROUP / STEP) + s;
      vi sums[WIDTH][ROWS];
      AIOS_LOOP (int t = 0; t < WIDTH; ++t)
        AIOS_LOOP (int r = 0; r < ROWS; ++r) sums[t][r] = splat(x.offsets[step * WIDTH + t]);
      dots<BITS, UNITS>(groups, s * UNITS, x.codes + step * UNITS * WIDTH, sums);
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
        const vf factor = splat(x.scales[step * STEP / 32 * WIDTH + t]);
        AIOS_LOOP (int r = 0; r < ROWS; ++r) {
          acc[t][r] = fma(to_float(sums[t][r]), factor * scale[r], acc[t][r]);
          if constexpr (MINIMUMS)
            acc[t][r] = fma(-splat(x.sums[step * WIDTH + t]), minimum[r], acc[t][r]);
        }
      }
    }
  }
  AIOS_LOOP (int t = 0; t < WIDTH; ++t)
    AIOS_LOOP (int r = 0; r < ROWS; ++r) store(out + t * BLOCKS * BLOCK + r * VL, acc[t][r]);
}

// BLOCKS blocks from `block` on for the tokens [first, first + count) of a tile.
template <int BLOCKS, int WIDTH>
AIOS_INLINE void panel(const Sizes* n, void* const* p, int64_t block, int64_t first, int64_t count,
                       const Tile& x) {
  alignas(64) float sums[STREAMS][WIDTH * BLOCKS * BLOCK];
  for (int s = 0; s < STREAMS; ++s)
    tile<BLOCKS, WIDTH>(weight(n, p) + (s * NUM_BLOCKS + block) * BLOCK_BYTES, x, sums[s]);
  const int64_t column = block * BLOCK, stop = min(column + BLOCKS * BLOCK, COLUMNS);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * BLOCKS * BLOCK;
    epilogue(n, p, first + t, column, stop, sums[0] + at, sums[STREAMS - 1] + at);
  }
}

template <int WIDTH>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const Tile& x) {
  constexpr int WIDE = 2 * VECTORS * WIDTH <= (VL == 16 ? 12 : 4) ? 2 : 1;
  for (; block + WIDE <= stop; block += WIDE) panel<WIDE, WIDTH>(n, p, block, first, count, x);
  if (WIDE > 1 && block < stop) panel<1, WIDTH>(n, p, block, first, count, x);
}

AIOS_INLINE void panels_of_width(int width, const Sizes* n, void* const* p, int64_t block,
                                 int64_t stop, int64_t first, int64_t count, const Tile& x) {
  if (width == 1) return panels<1>(n, p, block, stop, first, count, x);
  if constexpr (TILE > 2)
    if (width == 2) return panels<2>(n, p, block, stop, first, count, x);
  if constexpr (TILE > 4) {
    if (width == 4) return panels<4>(n, p, block, stop, first, count, x);
    if (width == 8) return panels<8>(n, p, block, stop, first, count, x);
  }
  panels<TILE>(n, p, block, stop, first, count, x);
}

AIOS_INLINE int64_t quantized_linear_items(const Sizes* n) {
  return Chunks(num_tokens(n)).chunks * ITEMS_N;
}

AIOS_INLINE void quantized_linear(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const Chunks chunks(num_tokens(n));
  Tile tiles[CHUNK_TILES];
  while (begin < end) {
    const int64_t chunk = begin / ITEMS_N, block = begin % ITEMS_N * ITEM;
    const int64_t items = min(end - begin, ITEMS_N - begin % ITEMS_N);
    const int64_t stop = min(block + items * ITEM, NUM_BLOCKS);
    const int64_t tile0 = chunks.first_tile(chunk), tile1 = chunks.first_tile(chunk + 1);
    for (int64_t i = tile0; i < tile1; ++i)
      quantize(n, p, i * TILE, chunks.tokens_of(i), tiles[i - tile0]);
    // A single tile passes over all its blocks; several share an item's blocks while in L2.
    const int64_t group = tile1 - tile0 == 1 ? stop - block : ITEM;
    for (int64_t b = block; b < stop; b += group)
      for (int64_t i = tile0; i < tile1; ++i) {
        const int64_t count = chunks.tokens_of(i);
        panels_of_width(width_of(count), n, p, b, min(b + group, stop), i * TILE, count,
                        tiles[i - tile0]);
      }
    begin += items;
  }
}
