// Linear: sum over k ascending of x[t, k] * w[n, k], one chain of fused multiply-adds an element,
// so that every tile, batch and split of the items gives the same bits.
//
// The text before this one defines Weight (float, bf16 or f16), K, COLUMNS (output columns),
// STREAMS (1, or 2 when row n of the second half of the matrix belongs to row n of the first),
// num_tokens(n), x_row(n, p, t), weight(n, p) and epilogue(n, p, i0, begin, end, sum0, sum1), which
// writes columns [begin, end) of token i0 from the sums of the two streams.

constexpr int BLOCK = 16;                            // rows of a packed block
constexpr int VECTORS = BLOCK / VL;                  // vectors of a packed block
constexpr int REGISTERS = VL == 8 ? 12 : 24;         // accumulators that fit in registers
constexpr int TILE = VL == 16 ? 12 : 6;              // tokens of a full tile
constexpr int ITEM = 2;                              // blocks of a work item
constexpr int64_t NUM_BLOCKS = (COLUMNS + BLOCK - 1) / BLOCK;
constexpr int64_t ITEMS_N = (NUM_BLOCKS + ITEM - 1) / ITEM;
// Packed tokens stay in the core's L2 (at most 384 KiB) while the weights of a panel pass by.
constexpr int64_t FITTING = 393216 / (K * TILE * (int64_t)sizeof(float));
constexpr int64_t CHUNK_TILES = FITTING > 1 ? FITTING : 1;

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

template <int BLOCKS, int WIDTH>
AIOS_INLINE void step(const Weight* w, const float* x, int64_t k,
                      vf (&acc)[WIDTH][BLOCKS * VECTORS]) {
  vf rows[BLOCKS * VECTORS];
#pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
        rows[b * VECTORS + v] = load(w + (b * K + k) * BLOCK + v * VL);
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t) {
    const vf value = splat(x[k * WIDTH + t]);
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) acc[t][r] = fma(rows[r], value, acc[t][r]);
  }
}

// sums[WIDTH][BLOCKS * 16] of x[K][WIDTH] (token fastest) and BLOCKS consecutive blocks at w.
template <int BLOCKS, int WIDTH>
AIOS_NOINLINE void tile(const Weight* w, const float* x, float* sums) {
  constexpr int STEPS = 4, ROW_BYTES = BLOCK * (int)sizeof(Weight);
  constexpr int64_t AHEAD = BLOCKS * K * BLOCK;  // the blocks that come after these
  vf acc[WIDTH][BLOCKS * VECTORS];
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) acc[t][r] = splat(0.0f);
  int64_t k = 0;
  for (; k + STEPS <= K; k += STEPS) {
    // Into L2, a whole group of blocks ahead: the hardware's prefetch loses its way at the start of
    // each block. One token, K = 1024, bf16: 94 % of the read bandwidth, 66 % without it (Zen 4).
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 8
      for (int line = 0; line < STEPS * ROW_BYTES; line += 64)
        __builtin_prefetch((const char*)(w + AHEAD + (b * K + k) * BLOCK) + line, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < STEPS; ++i) step<BLOCKS, WIDTH>(w, x, k + i, acc);
  }
  for (; k < K; ++k) step<BLOCKS, WIDTH>(w, x, k, acc);
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) store(sums + t * BLOCKS * BLOCK + r * VL, acc[t][r]);
}

// BLOCKS blocks from `block` on for the tokens [first, first + count) packed at x.
template <int BLOCKS, int WIDTH>
AIOS_INLINE void panel(const Sizes* n, void* const* p, int64_t block, int64_t first, int64_t count,
                       const float* x) {
  alignas(64) float sums[STREAMS][WIDTH * BLOCKS * BLOCK];
  for (int s = 0; s < STREAMS; ++s)
    tile<BLOCKS, WIDTH>(weight(n, p) + (s * NUM_BLOCKS + block) * K * BLOCK, x, sums[s]);
  const int64_t column = block * BLOCK, stop = min(column + BLOCKS * BLOCK, COLUMNS);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * BLOCKS * BLOCK;
    epilogue(n, p, first + t, column, stop, sums[0] + at, sums[STREAMS - 1] + at);
  }
}

// Blocks [block, stop) for one tile of tokens: as many blocks at a time as the registers hold. One
// and two tokens are bound by memory, where two streams are faster than four.
template <int WIDTH>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const float* x) {
  while (block < stop) {
    if constexpr (WIDTH > 2 && 4 * VECTORS * WIDTH <= REGISTERS)
      if (stop - block >= 4) {
        panel<4, WIDTH>(n, p, block, first, count, x);
        block += 4;
        continue;
      }
    if constexpr (2 * VECTORS * WIDTH <= REGISTERS)
      if (stop - block >= 2) {
        panel<2, WIDTH>(n, p, block, first, count, x);
        block += 2;
        continue;
      }
    panel<1, WIDTH>(n, p, block, first, count, x);
    block += 1;
  }
}

AIOS_INLINE void panels_of_width(int width, const Sizes* n, void* const* p, int64_t block,
                                 int64_t stop, int64_t first, int64_t count, const float* x) {
  if (width == 1) return panels<1>(n, p, block, stop, first, count, x);
  if constexpr (TILE > 2)
    if (width == 2) return panels<2>(n, p, block, stop, first, count, x);
  if constexpr (TILE > 4)
    if (width == 4) return panels<4>(n, p, block, stop, first, count, x);
  if constexpr (TILE > 8)
    if (width == 8) return panels<8>(n, p, block, stop, first, count, x);
  panels<TILE>(n, p, block, stop, first, count, x);
}

// Tokens of a tile as x[K][width], token fastest; missing tokens are zeros.
AIOS_NOINLINE void pack(const Sizes* n, void* const* p, int64_t first, int64_t count, float* out) {
  const float* rows[TILE];
  const int width = width_of(count);
  for (int64_t t = 0; t < count; ++t) rows[t] = x_row(n, p, first + t);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < width; ++t) out[k * width + t] = t < count ? rows[t][k] : 0.0f;
}

AIOS_INLINE int64_t linear_items(const Sizes* n) { return Chunks(num_tokens(n)).chunks * ITEMS_N; }

AIOS_INLINE void linear(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const Chunks chunks(num_tokens(n));
  alignas(64) float packed[CHUNK_TILES * TILE * K];
  while (begin < end) {
    const int64_t chunk = begin / ITEMS_N, block = begin % ITEMS_N * ITEM;
    const int64_t items = min(end - begin, ITEMS_N - begin % ITEMS_N);
    const int64_t stop = min(block + items * ITEM, NUM_BLOCKS);
    const int64_t tile0 = chunks.first_tile(chunk), tile1 = chunks.first_tile(chunk + 1);
    if (chunks.tokens > 1)
      for (int64_t i = tile0; i < tile1; ++i)
        pack(n, p, i * TILE, chunks.tokens_of(i), packed + (i - tile0) * TILE * K);
    // A single tile passes over all its blocks; several share an item's blocks while in L2.
    const int64_t group = tile1 - tile0 == 1 ? stop - block : ITEM;
    for (int64_t b = block; b < stop; b += group)
      for (int64_t i = tile0; i < tile1; ++i) {
        const float* x = chunks.tokens > 1 ? packed + (i - tile0) * TILE * K : x_row(n, p, 0);
        const int64_t count = chunks.tokens_of(i);
        panels_of_width(width_of(count), n, p, b, min(b + group, stop), i * TILE, count, x);
      }
    begin += items;
  }
}
