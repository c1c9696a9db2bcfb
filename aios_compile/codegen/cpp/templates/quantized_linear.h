// Quantised linear: int8 activations times the codes of a row, group by group ascending.
//
// The text before this one defines K, COLUMNS (output columns), STREAMS (1, or 2 when row n of the
// second half of the matrix belongs to row n of the first: the halves' blocks lie by turns), BITS,
// GROUP, LOW, SPAN, HEADER, GROUP_BYTES (of a row), JOINT, Scale, MINIMUMS, Minimum, SUPER_SCALE,
// SUPER_MINIMUM, ZERO_POINT, WORDS (of a prepared token, 32 bits each), num_tokens(n),
// x_row(n, p, t), weight(n, p), workspace(p), epilogue(n, p, i0, begin, end, sum0, sum1), ORDERED
// (x is read in another order) and column_of(p, k) (where values k, k + 1, ... of a row are in x).
//
// A block is 16 rows: K / SPAN super-blocks of [HEADER][codes, scales, minimums of each group],
// every field of the 16 rows side by side. JOINT groups (of formats without super-blocks) lie
// together: their codes, their scales, their minimums.

constexpr int STEP = GROUP < 32 ? GROUP : 32;        // values under one float operation
constexpr int UNITS = STEP / 4;
constexpr int64_t CODE_BYTES = GROUP * BITS / 8 * BLOCK;
constexpr int64_t SPAN_BYTES = HEADER * BLOCK + SPAN / GROUP * GROUP_BYTES * BLOCK;
constexpr int64_t BLOCK_BYTES = K / SPAN * SPAN_BYTES;
constexpr int64_t PER_SPAN = SPAN / GROUP;
// Tokens of a full tile: so many that two blocks' sums fit in registers and share each broadcast
// of activations. 12 tokens of one block are bound by loads, one a cycle; 8 of two are 1.12x as
// fast at 16 tokens in 8 bits and 1.04x in 4, 1.0 to 1.06x at 256 (K = 1024 and 3072, one core of
// Zen 4).
constexpr int TILE = VL == 16 ? 8 : VL == 8 ? 4 : 2;

// A prepared token. Each lies by itself, so that workers who prepare neighbours share no line.
struct alignas(64) Token {
  int32_t codes[K / 4];                        // four signed bytes each
  float scales[K / 32];
  int32_t offsets[K / STEP];                   // what dot products begin with
  float sums[MINIMUMS ? K / STEP : 1];         // of a group's values
};
static_assert(sizeof(Token) == WORDS * 4, "codegen/cpp/quantized_linear.py counts the words");

template <class C = Standard>
using LinearWork = Work<K, COLUMNS, TILE, TILE * (int64_t)sizeof(Token), C>;
constexpr int64_t NUM_BLOCKS = LinearWork<>::NUM_BLOCKS;

// Values [begin, end) of token t.
AIOS_NOINLINE void quantize(const Sizes* n, void* const* p, int64_t t, int64_t begin, int64_t end,
                            Token& out) {
  int32_t* sums = out.offsets + begin / STEP;
  const float* x = x_row(n, p, t);
  if constexpr (ORDERED) {
    alignas(64) float picked[PART];
    for (int64_t k = begin; k < end; k += PART) {
      const int64_t count = min(end - k, (int64_t)PART);
      const int32_t* columns = column_of(p, k);
      for (int64_t i = 0; i < count; ++i) picked[i] = x[columns[i]];
      quantize_row<STEP>(picked, count, (int8_t*)(out.codes + k / 4), out.scales + k / 32,
                         out.offsets + k / STEP);
    }
  } else {
    quantize_row<STEP>(x + begin, end - begin, (int8_t*)(out.codes + begin / 4),
                       out.scales + begin / 32, sums);
  }
  for (int64_t i = 0; i < (end - begin) / STEP; ++i) {
    const int64_t at = begin / STEP + i;
    if (MINIMUMS) out.sums[at] = out.scales[at * STEP / 32] * (float)sums[i];
    sums[i] *= offset_of<BITS>(LOW);
  }
}

// The first of the JOINT groups from `g` on, in the block at w.
AIOS_INLINE const uint8_t* groups_at(const uint8_t* w, int64_t g) {
  return w + g / PER_SPAN * SPAN_BYTES + HEADER * BLOCK + g % PER_SPAN * GROUP_BYTES * BLOCK;
}

// Whether the whole numbers of all JOINT groups of a block fit in registers for WIDTH tokens.
constexpr int JOINT_STEPS = JOINT * GROUP / STEP;
template <int WIDTH>
constexpr bool ASCENDING =
    JOINT_STEPS * VECTORS <= 4 && (WIDTH == 1 || (VL == 16 && JOINT_STEPS * WIDTH <= 8));

// How a tile of WIDTH tokens fetches one stream of weights: one token as C says. Prefetches into
// the first cache, which are dropped when its buffers are taken, lose with more (two tokens
// 0.7x as fast, eight 0.5x; one core of Zen 4).
template <class C, int WIDTH, class S = typename Either<IntoL2, FarIntoL2, WIDTH == 2>::Type>
using Way = typename Either<Fetching<C, WIDTH>, S, WIDTH == 1 || !ASCENDING<WIDTH>>::Type;

// The scales and minimums of group `j` of those at `groups` in the super-block at `span`.
AIOS_INLINE void scales_of(const uint8_t* span, const uint8_t* groups, int64_t j, vf* scale,
                           vf* minimum) {
  const uint8_t* scales = groups + JOINT * CODE_BYTES;
  const uint8_t* minimums = scales + JOINT * (int64_t)sizeof(Scale) * BLOCK;
  AIOS_LOOP (int r = 0; r < VECTORS; ++r) {
    const int64_t lane = j * BLOCK + r * VL;
    scale[r] = scales_at((const Scale*)scales + lane);
    if (SUPER_SCALE) scale[r] *= scales_at((const f16*)span + lane);
    if constexpr (MINIMUMS) {
      minimum[r] = scales_at((const Minimum*)minimums + lane);
      if (SUPER_MINIMUM) minimum[r] *= scales_at((const f16*)span + SUPER_SCALE * BLOCK + lane);
      if (ZERO_POINT) minimum[r] *= scale[r];
    }
  }
}

// The products of WIDTH tokens with the JOINT groups from `g` on of the block at w, onto acc: all
// codes, then the scales, in the order in which they lie. The hardware's prefetch follows lines
// that are met in ascending order, and the compiler would load the scales first, in a line behind
// the codes. Two cores of Zen 4: a step of 0.6B in 4 bits 1.13x as fast (one core 1.21x), kernels
// of 8 bits 1.2 to 1.3x; one core with two tokens, fetched into L2: 1.2 to 1.7x.
template <int WIDTH, class C>
AIOS_INLINE void add_ascending(const uint8_t* w, const Token* x, int64_t g,
                               vf (&acc)[WIDTH][VECTORS]) {
  constexpr int STEPS = GROUP / STEP;
  const uint8_t* groups = groups_at(w, g);
  if constexpr (C::FETCH)
    AIOS_LOOP (int line = 0; line < JOINT * GROUP_BYTES * BLOCK; line += 64)
      __builtin_prefetch(groups + C::AHEAD + line, 0, C::CACHE);
  vi sums[JOINT * STEPS][WIDTH][VECTORS];
  AIOS_LOOP (int i = 0; i < JOINT * STEPS; ++i) {
    const int64_t step = g * STEPS + i;
    AIOS_LOOP (int t = 0; t < WIDTH; ++t)
      AIOS_LOOP (int r = 0; r < VECTORS; ++r) sums[i][t][r] = splat(x[t].offsets[step]);
    const uint8_t* codes = groups + i / STEPS * CODE_BYTES;
    const int32_t* four = x->codes + step * UNITS;
    dots<BITS, UNITS, WORDS>(codes, 0, i % STEPS * UNITS, four, sums[i]);
    asm volatile("" : : : "memory");  // later loads stay behind these
  }
  AIOS_LOOP (int i = 0; i < JOINT * STEPS; ++i) {
    const int64_t step = g * STEPS + i;
    vf scale[VECTORS], minimum[VECTORS];
    scales_of(w + g / PER_SPAN * SPAN_BYTES, groups, i / STEPS, scale, minimum);
    AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
      const vf factor = splat(x[t].scales[step * STEP / 32]);
      AIOS_LOOP (int r = 0; r < VECTORS; ++r) {
        vf& total = acc[t][r];
        total = fma(to_float(sums[i][t][r]), factor * scale[r], total);
        if constexpr (MINIMUMS) total = fma(-splat(x[t].sums[step]), minimum[r], total);
      }
    }
  }
}

// sums[WIDTH][BLOCKS * 16] of a tile of tokens and BLOCKS consecutive blocks at w.
//
// One block after the other is one sequential stream, which one token needs: two blocks at a time
// take 1.2 to 2 times as long (2 cores of Zen 4), even where they lie as one stream: lines are met
// out of order. With more tokens two blocks share each broadcast of activations: loads, one a
// cycle, would be the limit. The float sums stay in registers, so the whole numbers of a group are
// those of LANES tokens at a time.
template <int BLOCKS, int WIDTH, class C>
AIOS_NOINLINE void tile(const uint8_t* w, const Token* x, float* out) {
  constexpr int COUNT = BLOCKS * VECTORS, LANES = BLOCKS > 1 && WIDTH > 4 ? WIDTH / 2 : WIDTH;
  constexpr int64_t AHEAD = BLOCKS > 1 ? BLOCKS * BLOCK_BYTES : C::AHEAD;
  vf acc[WIDTH][COUNT] = {};
  const auto add = [&](int64_t first_group, int64_t j) __attribute__((always_inline)) {
    const int64_t g = first_group + j;
    const uint8_t* groups = groups_at(w, first_group);
    if constexpr (C::FETCH)
      AIOS_LOOP (int b = 0; b < BLOCKS; ++b)
        AIOS_LOOP (int line = 0; line < GROUP_BYTES * BLOCK; line += 64)
          __builtin_prefetch(groups + j * GROUP_BYTES * BLOCK + b * BLOCK_BYTES + AHEAD + line, 0,
                             BLOCKS > 1 ? 2 : C::CACHE);
    vf scale[COUNT], minimum[COUNT];
    AIOS_LOOP (int b = 0; b < BLOCKS; ++b)
      scales_of(w + b * BLOCK_BYTES + g / PER_SPAN * SPAN_BYTES, groups + b * BLOCK_BYTES, j,
                scale + b * VECTORS, minimum + b * VECTORS);
    const uint8_t* codes = groups + j * CODE_BYTES;
    AIOS_LOOP (int s = 0; s < GROUP / STEP; ++s)
      AIOS_LOOP (int first = 0; first < WIDTH; first += LANES) {
        const int64_t step = g * (GROUP / STEP) + s;
        vi sums[LANES][COUNT];
        AIOS_LOOP (int t = 0; t < LANES; ++t)
          AIOS_LOOP (int r = 0; r < COUNT; ++r)
            sums[t][r] = splat(x[first + t].offsets[step]);
        asm("" : "+r"(codes));  // read the codes again: kept ones would be spilled
        const int32_t* four = x[first].codes + step * UNITS;
        dots<BITS, UNITS, WORDS>(codes, BLOCK_BYTES, s * UNITS, four, sums);
        AIOS_LOOP (int t = 0; t < LANES; ++t) {
          const vf factor = splat(x[first + t].scales[step * STEP / 32]);
          AIOS_LOOP (int r = 0; r < COUNT; ++r) {
            vf& total = acc[first + t][r];
            total = fma(to_float(sums[t][r]), factor * scale[r], total);
            if constexpr (MINIMUMS)
              total = fma(-splat(x[first + t].sums[step]), minimum[r], total);
          }
        }
      }
  };
  for (int64_t g = 0; g < K / GROUP; g += JOINT)
    if constexpr (BLOCKS == 1 && ASCENDING<WIDTH>)
      add_ascending<WIDTH, C>(w, x, g, acc);
    else if constexpr (WIDTH == 1)
      AIOS_LOOP (int j = 0; j < JOINT; ++j) add(g, j);
    else
      for (int64_t j = 0; j < JOINT; ++j) add(g, j);
  AIOS_LOOP (int t = 0; t < WIDTH; ++t)
    AIOS_LOOP (int r = 0; r < COUNT; ++r) store(out + t * BLOCKS * BLOCK + r * VL, acc[t][r]);
}

// The columns from `block` on that BLOCKS packed blocks give (one block's where they are those of
// two streams), for the tokens [first, first + count) of a tile.
template <int BLOCKS, int WIDTH, class C>
AIOS_INLINE void panel(const Sizes* n, void* const* p, int64_t block, int64_t first, int64_t count,
                       const Token* x) {
  constexpr int TILES = BLOCKS < STREAMS ? STREAMS : 1;
  alignas(64) float sums[TILES][WIDTH * BLOCKS * BLOCK];
  for (int i = 0; i < TILES; ++i)
    tile<BLOCKS, WIDTH, C>(weight(n, p) + (block * STREAMS + i) * BLOCK_BYTES, x, sums[i]);
  const float* second = TILES > 1 ? sums[TILES - 1] : sums[0] + (STREAMS - 1) * BLOCK;
  const int64_t column = block * BLOCK;
  const int64_t end = min(column + TILES * BLOCKS / STREAMS * BLOCK, COLUMNS);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * BLOCKS * BLOCK;
    epilogue(n, p, first + t, column, end, sums[0] + at, second + at);
  }
}

// Blocks [block, stop) for one tile of tokens: two at a time for 3 tokens and more, where their
// sums fit in registers. 3 and 4 tokens of 8 bits wait for memory more than for loads: one stream
// is 1.02 to 1.1x as fast (of 4 bits 0.95 to 1.04x; one core of Zen 4, K = 1024 to 3072).
template <int WIDTH, class C>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const Token* x) {
  constexpr bool STREAM = WIDTH <= 2 || (WIDTH <= 4 && BITS == 8 && ASCENDING<4>);
  constexpr bool TWO = VECTORS == 1 && !STREAM;
  if constexpr (TWO && STREAMS == 1)
    for (; stop - block >= 2; block += 2) panel<2, WIDTH, C>(n, p, block, first, count, x);
  if constexpr (!TWO || STREAMS > 1 || NUM_BLOCKS % 2)  // items begin at even blocks
    for (; block < stop; ++block) panel<TWO ? STREAMS : 1, WIDTH, C>(n, p, block, first, count, x);
}

AIOS_INLINE int64_t quantized_linear_items(const Sizes* n) {
  return LinearWork<>(num_tokens(n)).items();
}

template <class C = Standard>
AIOS_INLINE void quantized_linear(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const LinearWork<C> work(num_tokens(n));
  if (work.tokens == 1) {
    Token token;
    quantize(n, p, 0, 0, K, token);
    return panels<1, C>(n, p, begin * ITEM, min(end * ITEM, NUM_BLOCKS), 0, 1, &token);
  }
  Token* const tokens = (Token*)workspace(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / work.PARTS, k = item % work.PARTS * PART;
    quantize(n, p, t, k, min(k + PART, K), tokens[t]);
    if (k == 0)
      work.behind_last(t, [&](int64_t count) { memset(tokens + t + 1, 0, count * sizeof(Token)); });
  }
}

template <class C = Standard>
AIOS_INLINE int64_t quantized_linear_finish_items(const Sizes* n, void* const*) {
  return LinearWork<C>(num_tokens(n)).finish_items();
}

template <class C = Standard>
AIOS_INLINE void quantized_linear_finish(const Sizes* n, void* const* p, int64_t begin,
                                         int64_t end) {
  const LinearWork<C> work(num_tokens(n));
  work.for_panels(begin, end, [&](int64_t block, int64_t stop, int64_t tile, auto width) {
    constexpr int WIDTH = width.value;
    panels<WIDTH, Way<C, WIDTH>>(n, p, block, stop, tile * TILE, work.tokens_of(tile),
                                 (const Token*)workspace(p) + tile * TILE);
  });
}
