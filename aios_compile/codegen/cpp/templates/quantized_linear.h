// Quantised linear: int8 activations times the codes of a row, group by group ascending.
//
// The text before this one defines K, COLUMNS (output columns), STREAMS (1, or 2 when row n of the
// second half of the matrix belongs to row n of the first), BITS, GROUP, LOW, SPAN, HEADER,
// GROUP_BYTES (of a row), JOINT, Scale, MINIMUMS, Minimum, SUPER_SCALE, SUPER_MINIMUM, ZERO_POINT,
// WORDS (of a prepared token, 32 bits each), num_tokens(n), x_row(n, p, t), weight(n, p),
// workspace(p) and epilogue(n, p, i0, begin, end, sum0, sum1).
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
// Long blocks push a lone token out of the first cache, and loads of its single words then wait for
// one line all together. Of 4 bits, which meet the most words a byte: K = 3072, one core of Zen 4:
// 79 % of plain reading word by word, 88 % at once. 8 bits lose 5 to 10 % so, and blocks that are
// short or lie in a cache up to 15 %: a lane of a register costs more there than a load.
constexpr bool AT_ONCE = BITS == 4 && BLOCK_BYTES > 24576;
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
  quantize_row<STEP>(x_row(n, p, t) + begin, end - begin, (int8_t*)(out.codes + begin / 4),
                     out.scales + begin / 32, sums);
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

// sums[WIDTH][BLOCKS * 16] of a tile of tokens and BLOCKS consecutive blocks at w.
//
// One block after the other is one sequential stream, which one token needs: K = 1024, 8 and 4
// bits: 88 % and 95 % of the read bandwidth; 70 % and 80 % with two blocks at a time; 44 % and 37 %
// without the prefetch (2 cores of Zen 4). With more tokens two blocks share each broadcast of
// activations: loads, one a cycle, would be the limit. The float sums stay in registers, so the
// whole numbers of a group are those of LANES tokens at a time.
template <int BLOCKS, int WIDTH, class C>
AIOS_NOINLINE void tile(const uint8_t* w, const Token* x, float* out) {
  constexpr int COUNT = BLOCKS * VECTORS, LANES = BLOCKS > 1 && WIDTH > 4 ? 4 : WIDTH;
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
        dots<BITS, UNITS, WORDS, AT_ONCE>(codes, BLOCK_BYTES, s * UNITS, four, sums);
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
    if constexpr (WIDTH == 1)
      AIOS_LOOP (int j = 0; j < JOINT; ++j) add(g, j);
    else
      for (int64_t j = 0; j < JOINT; ++j) add(g, j);
  AIOS_LOOP (int t = 0; t < WIDTH; ++t)
    AIOS_LOOP (int r = 0; r < COUNT; ++r) store(out + t * BLOCKS * BLOCK + r * VL, acc[t][r]);
}

// BLOCKS blocks from `block` on for the tokens [first, first + count) of a tile.
template <int BLOCKS, int WIDTH, class C>
AIOS_INLINE void panel(const Sizes* n, void* const* p, int64_t block, int64_t first, int64_t count,
                       const Token* x) {
  alignas(64) float sums[STREAMS][WIDTH * BLOCKS * BLOCK];
  for (int s = 0; s < STREAMS; ++s)
    tile<BLOCKS, WIDTH, C>(weight(n, p) + (s * NUM_BLOCKS + block) * BLOCK_BYTES, x, sums[s]);
  const int64_t column = block * BLOCK, end = min(column + BLOCKS * BLOCK, COLUMNS);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * BLOCKS * BLOCK;
    epilogue(n, p, first + t, column, end, sums[0] + at, sums[STREAMS - 1] + at);
  }
}

// Blocks [block, stop) for one tile of tokens: two at a time for 4 and 8 tokens, whose sums fit in
// registers then.
template <int WIDTH, class C>
AIOS_NOINLINE void panels(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                          int64_t first, int64_t count, const Token* x) {
  constexpr bool TWO = VECTORS == 1 && (WIDTH == 4 || WIDTH == 8);
  if constexpr (TWO)
    for (; stop - block >= 2; block += 2) panel<2, WIDTH, C>(n, p, block, first, count, x);
  if constexpr (!TWO || NUM_BLOCKS % 2)  // items begin at even blocks
    for (; block < stop; ++block) panel<1, WIDTH, C>(n, p, block, first, count, x);
}

// Blocks [block, stop) of two streams for one token, a run of blocks of each by turns: at each jump
// the hardware's prefetch begins anew. K = 1024, 4 bits, two cores of Zen 4: 1.25x as fast as with
// a jump behind every block (one core: 0.9-1.5x); a single stream of both would be 1.36x.
template <class C>
AIOS_NOINLINE void runs(const Sizes* n, void* const* p, int64_t block, int64_t stop,
                        const Token* x) {
  alignas(64) float sums[STREAMS][RUN * BLOCK];
  for (; block < stop; block += RUN) {
    const int64_t end = min(block + RUN, stop);
    for (int s = 0; s < STREAMS; ++s)
      for (int64_t b = block; b < end; ++b)
        tile<1, 1, C>(weight(n, p) + (s * NUM_BLOCKS + b) * BLOCK_BYTES, x,
                      sums[s] + (b - block) * BLOCK);
    epilogue(n, p, 0, block * BLOCK, min(end * BLOCK, COLUMNS), sums[0], sums[STREAMS - 1]);
  }
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
    const int64_t block = begin * ITEM, stop = min(end * ITEM, NUM_BLOCKS);
    if constexpr (STREAMS > 1) return runs<C>(n, p, block, stop, &token);
    return panels<1, C>(n, p, block, stop, 0, 1, &token);
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
    panels<WIDTH, Fetching<C, WIDTH>>(n, p, block, stop, tile * TILE, work.tokens_of(tile),
                                      (const Token*)workspace(p) + tile * TILE);
  });
}
