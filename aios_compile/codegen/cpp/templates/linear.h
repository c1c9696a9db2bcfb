// Linear: sum over k ascending of x[t, k] * w[n, k], one chain of products an element, so that
// every tile, batch and split of the items gives the same bits.
//
// The text before this one defines Weight (float, bf16, f16, pair), Element (what a token's values
// become: float, or pair for weights in pairs), PER (values of an element), K, COLUMNS (output
// columns), STRIDE (elements from a prepared token to the next), STREAMS (1, or 2 when row n of the
// second half of the matrix belongs to row n of the first: the halves' blocks lie by turns),
// num_tokens(n), x_row(n, p, t), weight(n, p), workspace(p) and epilogue(n, p, i0, begin, end,
// sum0, sum1), which writes columns [begin, end) of token i0 from the sums of the two streams.

constexpr int REGISTERS = VL == 8 ? 12 : 24;         // accumulators that fit in registers
constexpr int TILE = VL == 16 ? 12 : 6;              // tokens of a full tile
constexpr int64_t DEPTH = (K + PER - 1) / PER;       // elements of a token

template <class C = Standard>
using LinearWork = Work<K, COLUMNS, TILE, DEPTH * TILE * (int64_t)sizeof(Element), C>;
constexpr int64_t NUM_BLOCKS = LinearWork<>::NUM_BLOCKS;

template <int BLOCKS, int WIDTH>
AIOS_INLINE void step(const Weight* w, const Element* x, int64_t k,
                      vf (&acc)[WIDTH][BLOCKS * VECTORS]) {
  decltype(load(w)) rows[BLOCKS * VECTORS];
#pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      rows[b * VECTORS + v] = load(w + (b * DEPTH + k) * BLOCK + v * VL);
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t) {
    const Element value = x[t * STRIDE + k];
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) acc[t][r] = add_product(rows[r], value, acc[t][r]);
  }
}

// sums[WIDTH][BLOCKS * 16] of x[WIDTH][STRIDE] and BLOCKS consecutive blocks at w.
template <int BLOCKS, int WIDTH, class C>
AIOS_NOINLINE void tile(const Weight* w, const Element* x, float* sums) {
  constexpr int STEPS = 4, ROW_BYTES = BLOCK * (int)sizeof(Weight);
  // One block after the other is one stream: a page ahead, into the first cache. Several at a time:
  // a whole group of blocks ahead, into L2, because the hardware loses its way at the start of each
  // block. One token, K = 1024, pairs: 100 % of the read bandwidth in one stream, 83 % in two; bf16
  // in two: 94 %, 66 % without these lines (2 cores of Zen 4).
  constexpr int64_t AHEAD = BLOCKS > 1 ? BLOCKS * DEPTH : C::AHEAD / ROW_BYTES;  // rows of a block
  vf acc[WIDTH][BLOCKS * VECTORS];
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) acc[t][r] = splat(0.0f);
  int64_t k = 0;
  for (; k + STEPS <= DEPTH; k += STEPS) {
    if constexpr (C::FETCH)
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 8
        for (int line = 0; line < STEPS * ROW_BYTES; line += 64)
          __builtin_prefetch((const char*)(w + (AHEAD + b * DEPTH + k) * BLOCK) + line, 0,
                             BLOCKS > 1 ? 2 : C::CACHE);
#pragma GCC unroll 4
    for (int i = 0; i < STEPS; ++i) step<BLOCKS, WIDTH>(w, x, k + i, acc);
  }
  for (; k < DEPTH; ++k) step<BLOCKS, WIDTH>(w, x, k, acc);
#pragma GCC unroll 16
  for (int t = 0; t < WIDTH; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < BLOCKS * VECTORS; ++r) store(sums + t * BLOCKS * BLOCK + r * VL, acc[t][r]);
}

// The columns from `block` on that BLOCKS packed blocks give (one block's where they are those of
// two streams), for the tokens [first, first + count) prepared at x.
template <int BLOCKS, int WIDTH, class C>
AIOS_INLINE void panel(const Sizes* n, void* const* p, int64_t block, int64_t first, int64_t count,
                       const Element* x) {
  constexpr int TILES = BLOCKS < STREAMS ? STREAMS : 1;
  alignas(64) float sums[TILES][WIDTH * BLOCKS * BLOCK];
  const Weight* w = (const Weight*)weight(n, p) + block * STREAMS * DEPTH * BLOCK;
  for (int i = 0; i < TILES; ++i)
    tile<BLOCKS, WIDTH, C>(w + i * DEPTH * BLOCK, x, sums[i]);
  const float* second = TILES > 1 ? sums[TILES - 1] : sums[0] + (STREAMS - 1) * BLOCK;
  const int64_t column = block * BLOCK;
  const int64_t stop = min(column + TILES * BLOCKS / STREAMS * BLOCK, COLUMNS);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * BLOCKS * BLOCK;
    epilogue(n, p, first + t, column, stop, sums[0] + at, second + at);
  }
}

// Blocks [block, stop) for one tile of tokens. Two at a time where the registers hold them: a
// loaded value serves twice, and chains of float products are too long for one stream. One or two
// tokens of pairs are bound by memory: there a single stream is the fastest.
template <int WIDTH, class C>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const Element* x) {
  constexpr bool TWO = 2 * VECTORS * WIDTH <= REGISTERS && (PER == 1 || WIDTH > 2);
  if constexpr (TWO && STREAMS == 1)
    for (; stop - block >= 2; block += 2) panel<2, WIDTH, C>(n, p, block, first, count, x);
  for (; block < stop; ++block) panel<TWO ? STREAMS : 1, WIDTH, C>(n, p, block, first, count, x);
}

// A lone token's elements: its values where they are, or rounded ones in `space`.
AIOS_INLINE const float* single(const float* x, float*) { return x; }
AIOS_INLINE const pair* single(const float* x, pair* space) {
  elements_of(x, K, space);
  return space;
}

// Part `part` of token t, prepared; the last token clears those that its tile lacks.
AIOS_NOINLINE void prepare(const Sizes* n, void* const* p, const LinearWork<>& work, int64_t t,
                           int64_t part) {
  const int64_t begin = part * PART, end = min(begin + PART, K);
  Element* out = (Element*)workspace(p) + t * STRIDE + begin / PER;
  elements_of(x_row(n, p, t) + begin, end - begin, out);
  work.behind_last(t, [&](int64_t count) {
    for (int64_t i = 1; i <= count; ++i)
      memset(out + i * STRIDE, 0, (end - begin + PER - 1) / PER * sizeof(Element));
  });
}

AIOS_INLINE int64_t linear_items(const Sizes* n) { return LinearWork<>(num_tokens(n)).items(); }

template <class C = Standard>
AIOS_INLINE void linear(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const LinearWork<> work(num_tokens(n));
  if (work.tokens == 1) {
    alignas(64) Element space[PER > 1 ? DEPTH : 1];
    const Element* x = single(x_row(n, p, 0), space);
    return panels<1, C>(n, p, begin * ITEM, min(end * ITEM, NUM_BLOCKS), 0, 1, x);
  }
  for (int64_t item = begin; item < end; ++item)
    prepare(n, p, work, item / work.PARTS, item % work.PARTS);
}

template <class C = Standard>
AIOS_INLINE int64_t linear_finish_items(const Sizes* n, void* const*) {
  return LinearWork<C>(num_tokens(n)).finish_items();
}

template <class C = Standard>
AIOS_INLINE void linear_finish(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const LinearWork<C> work(num_tokens(n));
  work.for_panels(begin, end, [&](int64_t block, int64_t stop, int64_t tile, auto width) {
    const Element* x = (const Element*)workspace(p) + tile * TILE * STRIDE;
    constexpr int WIDTH = width.value;
    panels<WIDTH, Fetching<C, WIDTH>>(n, p, block, stop, tile * TILE, work.tokens_of(tile), x);
  });
}
