// A mixture's product on quantised matrices: row i of out is x[i / choices] times one expert's.
//
// The text before this one is that of quantized_linear.h, whose prepared tokens and tiles it uses:
// num_tokens are the rows of x, COLUMNS those of one expert's matrix, and epilogue stores row i. It
// also defines E, num_pairs(n) and expert_at(n, p, i).

constexpr int64_t MATRIX_BYTES = NUM_BLOCKS * BLOCK_BYTES;
// Blocks of an item: the more, the fewer copies of tokens are made for it; they stay in L2 while
// the tiles of tokens that chose the expert pass over them.
constexpr int64_t FITTING = Standard::L2_BYTES / BLOCK_BYTES / ITEM * ITEM;
constexpr int64_t PANEL = FITTING < ITEM ? ITEM : FITTING > 8 ? 8 : FITTING;
constexpr int64_t PANELS = (NUM_BLOCKS + PANEL - 1) / PANEL;

// The blocks [block, stop) of an expert for `count` rows that chose it; x are their WIDTH tokens.
template <int WIDTH>
AIOS_NOINLINE void expert_rows(const Sizes* n, void* const* p, int64_t expert, int64_t block,
                               int64_t stop, const int64_t* rows, int64_t count, const Token* x) {
  constexpr int BLOCKS = VECTORS == 1 && WIDTH >= 4 && NUM_BLOCKS % 2 == 0 ? 2 : 1;
  const uint8_t* w = weight(n, p) + expert * MATRIX_BYTES;
  for (; block < stop; block += BLOCKS) {
    alignas(64) float sums[WIDTH * BLOCKS * BLOCK];
    tile<BLOCKS, WIDTH, Fetching<Standard, WIDTH>>(w + block * BLOCK_BYTES, x, sums);
    for (int64_t t = 0; t < count; ++t)
      epilogue(n, p, rows[t], block * BLOCK, (block + BLOCKS) * BLOCK, sums + t * BLOCKS * BLOCK,
               nullptr);
  }
}

// Multiply the rows in `rows`, at most a tile of them, with their expert's blocks.
AIOS_INLINE void multiply(const Sizes* n, void* const* p, const Token* tokens, int64_t expert,
                          int64_t block, int64_t stop, const int64_t* rows, int64_t count) {
  const int64_t choices = num_pairs(n) / num_tokens(n);
  if (count == 1)
    return expert_rows<1>(n, p, expert, block, stop, rows, 1, tokens + rows[0] / choices);
  with_width<TILE>(count, [&](auto width) {
    constexpr int WIDTH = width.value;
    Token chosen[WIDTH];
    for (int64_t t = 0; t < WIDTH; ++t)  // what fills up the tile is computed and not stored
      memcpy(chosen + t, tokens + rows[t < count ? t : 0] / choices, sizeof(Token));
    expert_rows<WIDTH>(n, p, expert, block, stop, rows, count, chosen);
  });
}

// Items [begin, end): panels of blocks of the experts that were chosen. Fewer rows than experts:
// a row's slot is that of its expert if no row before it chose that one, else it is empty.
AIOS_INLINE void multiply_items(const Sizes* n, void* const* p, const Token* tokens, int64_t begin,
                                int64_t end) {
  const int64_t count = num_pairs(n), slots = min(count, E);
  const auto chose = [&](int64_t i) { return expert_of<E>(load1(expert_at(n, p, i))); };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t slot = item % slots, block = item / slots * PANEL;
    const int64_t stop = min(block + PANEL, NUM_BLOCKS);
    const int64_t expert = slots < E ? chose(slot) : slot;
    int64_t rows[TILE], filled = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (chose(i) != expert) continue;
      if (slots < E && i < slot) break;
      rows[filled++] = i;
      if (filled < TILE) continue;
      multiply(n, p, tokens, expert, block, stop, rows, filled);
      filled = 0;
    }
    if (filled > 0) multiply(n, p, tokens, expert, block, stop, rows, filled);
  }
}

AIOS_INLINE int64_t num_products(const Sizes* n) { return PANELS * min(num_pairs(n), E); }

AIOS_INLINE int64_t quantized_expert_linear_items(const Sizes* n) {
  if (num_pairs(n) == 0) return 0;
  return num_tokens(n) == 1 ? num_products(n) : num_tokens(n) * LinearWork<>::PARTS;
}

AIOS_INLINE void quantized_expert_linear(const Sizes* n, void* const* p, int64_t begin,
                                         int64_t end) {
  if (num_tokens(n) == 1) {
    Token token;
    quantize(n, p, 0, 0, K, token);
    return multiply_items(n, p, &token, begin, end);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / LinearWork<>::PARTS, k = item % LinearWork<>::PARTS * PART;
    quantize(n, p, t, k, min(k + PART, K), ((Token*)workspace(p))[t]);
  }
}

AIOS_INLINE int64_t quantized_expert_linear_finish_items(const Sizes* n, void* const*) {
  return num_tokens(n) == 1 ? 0 : num_products(n);
}

AIOS_INLINE void quantized_expert_linear_finish(const Sizes* n, void* const* p, int64_t begin,
                                                int64_t end) {
  multiply_items(n, p, (const Token*)workspace(p), begin, end);
}
