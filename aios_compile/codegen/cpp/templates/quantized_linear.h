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
// Tokens of a chunk: few, because a worker quantises a chunk's tokens each time it takes items of
// it, and enough that the weights, which pass by once a chunk, do not have to come from memory
// faster than they are multiplied.
constexpr int64_t CHUNK_TILES = 2;

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

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

template <int WIDTH>
AIOS_NOINLINE void quantize(const Sizes* n, void* const* p, int64_t first, int64_t count,
                            Tile& out) {
  alignas(64) int32_t codes[WIDTH][K / 4], sums[WIDTH][K / STEP];
  alignas(64) float scales[WIDTH][K / 32];
  if (WIDTH == 1) {
    quantize_row<STEP, K>(x_row(n, p, first), (int8_t*)out.codes, out.scales, sums[0]);
  } else {
    for (int64_t t = 0; t < count; ++t)
      quantize_row<STEP, K>(x_row(n, p, first + t), (int8_t*)codes[t], scales[t], sums[t]);
    for (int64_t t = count; t < WIDTH; ++t) {
      memset(codes[t], 0, sizeof(codes[t]));
      memset(scales[t], 0, sizeof(scales[t]));
      memset(sums[t], 0, sizeof(sums[t]));
    }
    for (int64_t i = 0; i < K / 4; ++i)
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) out.codes[i * WIDTH + t] = codes[t][i];
    for (int64_t i = 0; i < K / 32; ++i)
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) out.scales[i * WIDTH + t] = scales[t][i];
  }
  for (int64_t i = 0; i < K / STEP; ++i)
    AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
      out.offsets[i * WIDTH + t] = offset_of<BITS>(LOW) * sums[t][i];
      if (MINIMUMS)
        out.sums[i * WIDTH + t] = out.scales[i * STEP / 32 * WIDTH + t] * (float)sums[t][i];
    }
}

// The scales and minimums of group `g` of the block at w.
AIOS_INLINE void scales_of(const uint8_t* w, int64_t g, vf (&scale)[VECTORS],
                           vf (&minimum)[VECTORS]) {
  constexpr int64_t PER_SPAN = SPAN / GROUP;
  const uint8_t* span = w + g / PER_SPAN * SPAN_BYTES;
  const uint8_t* end = span + HEADER * BLOCK + g % PER_SPAN * GROUP_BYTES * BLOCK + CODE_BYTES;
  AIOS_LOOP (int r = 0; r < VECTORS; ++r) {
    const int lane = r * VL;
    scale[r] = scales_at((const Scale*)end + lane);
    if (SUPER_SCALE) scale[r] *= scales_at((const f16*)span + lane);
    if constexpr (MINIMUMS) {
      minimum[r] = scales_at((const Minimum*)(end + BLOCK * sizeof(Scale)) + lane);
      if (SUPER_MINIMUM) minimum[r] *= scales_at((const f16*)span + SUPER_SCALE * BLOCK + lane);
      if (ZERO_POINT) minimum[r] *= scale[r];
    }
  }
}

// sums[WIDTH][16] of a tile of tokens and the block at w.
template <int WIDTH>
AIOS_NOINLINE void tile(const uint8_t* w, const Tile& x, float* out) {
  vf acc[WIDTH][VECTORS] = {};
  for (int64_t g = 0; g < K / GROUP; ++g) {
    const uint8_t* group = w + g / (SPAN / GROUP) * SPAN_BYTES + HEADER * BLOCK +
                           g % (SPAN / GROUP) * GROUP_BYTES * BLOCK;
    // A page ahead, into the first cache. One block after the other is one sequential stream: one
    // token, K = 1024, 8 and 4 bits: 88 % and 95 % of the read bandwidth; 70 % and 80 % with two
    // blocks at a time; 44 % and 37 % without these lines (2 cores of Zen 4).
    AIOS_LOOP (int line = 0; line < GROUP_BYTES * BLOCK; line += 64)
      __builtin_prefetch(group + 4096 + line, 0, 3);
    vf scale[VECTORS], minimum[VECTORS];
    scales_of(w, g, scale, minimum);
    AIOS_LOOP (int s = 0; s < GROUP / STEP; ++s) {
      const int64_t step = g * (GROUP / STEP) + s;
      vi sums[WIDTH][VECTORS];
      AIOS_LOOP (int t = 0; t < WIDTH; ++t)
        AIOS_LOOP (int r = 0; r < VECTORS; ++r) sums[t][r] = splat(x.offsets[step * WIDTH + t]);
      dots<BITS, UNITS>(group, s * UNITS, x.codes + step * UNITS * WIDTH, sums);
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
        const vf factor = splat(x.scales[step * STEP / 32 * WIDTH + t]);
        AIOS_LOOP (int r = 0; r < VECTORS; ++r) {
          acc[t][r] = fma(to_float(sums[t][r]), factor * scale[r], acc[t][r]);
          if constexpr (MINIMUMS)
            acc[t][r] = fma(-splat(x.sums[step * WIDTH + t]), minimum[r], acc[t][r]);
        }
      }
    }
  }
  AIOS_LOOP (int t = 0; t < WIDTH; ++t)
    AIOS_LOOP (int r = 0; r < VECTORS; ++r) store(out + t * BLOCK + r * VL, acc[t][r]);
}

// Blocks [block, stop) for the tokens [first, first + count) of a tile.
template <int WIDTH>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const Tile& x) {
  alignas(64) float sums[STREAMS][WIDTH * BLOCK];
  for (; block < stop; ++block) {
    for (int s = 0; s < STREAMS; ++s)
      tile<WIDTH>(weight(n, p) + (s * NUM_BLOCKS + block) * BLOCK_BYTES, x, sums[s]);
    const int64_t column = block * BLOCK, end = min(column + BLOCK, COLUMNS);
    for (int64_t t = 0; t < count; ++t)
      epilogue(n, p, first + t, column, end, sums[0] + t * BLOCK, sums[STREAMS - 1] + t * BLOCK);
  }
}

// Call use(width) with the tile's width as a constant.
template <class Use> AIOS_INLINE void with_width(int64_t tokens, Use use) {
  const int width = width_of(tokens);
  if (width == 1) return use(Constant<1>());
  if constexpr (TILE > 2)
    if (width == 2) return use(Constant<2>());
  if constexpr (TILE > 4) {
    if (width == 4) return use(Constant<4>());
    if (width == 8) return use(Constant<8>());
  }
  use(Constant<TILE>());
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
      with_width(chunks.tokens_of(i), [&](auto width) {
        quantize<width.value>(n, p, i * TILE, chunks.tokens_of(i), tiles[i - tile0]);
      });
    // A single tile passes over all its blocks; several share an item's blocks while in L2.
    const int64_t group = tile1 - tile0 == 1 ? stop - block : ITEM;
    for (int64_t b = block; b < stop; b += group)
      for (int64_t i = tile0; i < tile1; ++i)
        with_width(chunks.tokens_of(i), [&](auto width) {
          panels<width.value>(n, p, b, min(b + group, stop), i * TILE, chunks.tokens_of(i),
                              tiles[i - tile0]);
        });
    begin += items;
  }
}
