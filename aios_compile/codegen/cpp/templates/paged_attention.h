// Paged attention with an online softmax: pages ascending, one page a step, so that a row's bits do
// not depend on its batch, its chunk of the prompt, or the tile that computes it.
//
// The text before this one defines KeyValue (float, bf16 or f16), HEADS, KV_HEADS, D, DV, PAGE,
// SCALE, SOFTCAP (0: none), WINDOW and CHUNK (0: none), HAS_SINKS, num_tokens(n), num_sequences(n),
// and the addresses q_at, k_at, v_at, out_at, pages_of, start_of, length_of, sink_at.

constexpr int GROUP = HEADS / KV_HEADS;                 // query heads of one key/value head
constexpr int TOKENS = GROUP >= 32 ? 1 : 32 / GROUP;    // query tokens of a tile
constexpr int ROWS = TOKENS * GROUP;                    // row = token of the tile * GROUP + head
constexpr int PAGE_VECTORS = PAGE / VL;
constexpr int AHEAD = 4;                                // pages whose scores are computed together
constexpr int REGISTERS = VL == 8 ? 8 : 16;             // accumulators, leaving room for operands
constexpr int DV_VECTORS = (DV + VL - 1) / VL;
constexpr int WIDE = DV_VECTORS * VL;                   // row length of `out` in scratch
// finite: exp(LOWEST - LOWEST) is 1, not NaN
constexpr float LOWEST = -3.0e38f;

struct Tile {
  int rows;
  int64_t context;                        // tokens of the sequence in the cache
  int64_t from[ROWS], to[ROWS];           // visible keys of each row, both ends included
  alignas(64) float q[ROWS][D];
  alignas(64) float scores[ROWS][AHEAD * PAGE];  // then probabilities
  alignas(64) float out[ROWS][WIDE];
  alignas(64) float sums[ROWS][VL];
  float highest[ROWS], rescale[ROWS];
};

// scores[row .. row + R)[page .. page + P) = q . k, over d ascending; the keys of a page are lanes.
template <int R, int P>
AIOS_INLINE void dot(Tile& tile, int row, int page, const KeyValue* const* keys) {
  vf acc[R][P * PAGE_VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < P * PAGE_VECTORS; ++i) acc[r][i] = splat(0.0f);
  for (int64_t d = 0; d < D; ++d) {
    vf key[P * PAGE_VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < P * PAGE_VECTORS; ++i)
      key[i] = load(keys[page + i / PAGE_VECTORS] + d * PAGE + i % PAGE_VECTORS * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(tile.q[row + r][d]);
#pragma GCC unroll 16
      for (int i = 0; i < P * PAGE_VECTORS; ++i) acc[r][i] = fma(key[i], value, acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < P * PAGE_VECTORS; ++i)
      store(&tile.scores[row + r][page * PAGE + i * VL], acc[r][i]);
}

template <int R>
AIOS_NOINLINE void dot_pages(Tile& tile, int row, int pages, const KeyValue* const* keys) {
  constexpr int FIT = REGISTERS / (R * PAGE_VECTORS);
  constexpr int P = FIT >= AHEAD ? AHEAD : FIT >= 2 ? 2 : 1;
  int page = 0;
  for (; page + P <= pages; page += P) dot<R, P>(tile, row, page, keys);
  if constexpr (P > 1)
    for (; page < pages; ++page) dot<R, 1>(tile, row, page, keys);
}

AIOS_INLINE void dot_rows(Tile& tile, int pages, const KeyValue* const* keys) {
  int row = 0;
  for (; row + 8 <= tile.rows; row += 8) dot_pages<8>(tile, row, pages, keys);
  for (; row + 4 <= tile.rows; row += 4) dot_pages<4>(tile, row, pages, keys);
  for (; row + 2 <= tile.rows; row += 2) dot_pages<2>(tile, row, pages, keys);
  for (; row < tile.rows; ++row) dot_pages<1>(tile, row, pages, keys);
}

// Scores of one page -> probabilities relative to the highest score so far. Unused slots may hold
// anything, NaN too: they are replaced, not multiplied by zero.
AIOS_NOINLINE void softmax_step(Tile& tile, int64_t first_key, int page) {
  for (int r = 0; r < tile.rows; ++r) {
    float* s = &tile.scores[r][page * PAGE];
    const int64_t from = tile.from[r] - first_key, to = tile.to[r] - first_key;
    tile.rescale[r] = 1.0f;
    if (to < 0 || from >= PAGE) {
      for (int i = 0; i < PAGE_VECTORS; ++i) store(s + i * VL, splat(0.0f));
      continue;
    }
    vf score[PAGE_VECTORS], top = splat(LOWEST);
#pragma GCC unroll 8
    for (int i = 0; i < PAGE_VECTORS; ++i) {
      score[i] = load(s + i * VL) * SCALE;
      if (SOFTCAP != 0.0f) score[i] = SOFTCAP * tanh(score[i] / SOFTCAP);
      if (from > 0 || to < PAGE - 1) {
        const vi key = lanes() + i * VL;
        const int32_t low = from > 0 ? (int32_t)from : 0, high = to < PAGE ? (int32_t)to : PAGE;
        score[i] = select((key >= low) & (key <= high), score[i], splat(-kInfinity));
      }
      top = max(top, score[i]);
    }
    const float highest = max(tile.highest[r], reduce_max(top));
    if (highest != tile.highest[r]) tile.rescale[r] = exp(tile.highest[r] - highest);
    tile.highest[r] = highest;
    vf sum = load(tile.sums[r]) * tile.rescale[r];
#pragma GCC unroll 8
    for (int i = 0; i < PAGE_VECTORS; ++i) {
      const vf probability = exp(score[i] - highest);
      store(s + i * VL, probability);
      sum += probability;
    }
    store(tile.sums[r], sum);
  }
}

// out[row .. row + R)[V vectors] = out * rescale + probabilities . values, over the keys ascending.
template <int R, int V, bool FULL>
AIOS_INLINE void add_values(Tile& tile, int row, int64_t column, int page, int64_t keys,
                            const KeyValue* values) {
  vf acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      acc[r][v] = load(&tile.out[row + r][column + v * VL]) * tile.rescale[row + r];
  for (int64_t j = 0; j < keys; ++j) {
    vf value[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const KeyValue* at = values + j * DV + column + v * VL;
      if constexpr (FULL) value[v] = load(at);
      else value[v] = load(at, DV % VL);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf probability = splat(tile.scores[row + r][page * PAGE + j]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = fma(value[v], probability, acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(&tile.out[row + r][column + v * VL], acc[r][v]);
}

template <int R>
AIOS_NOINLINE void add_rows(Tile& tile, int row, int page, int64_t keys, const KeyValue* values) {
  constexpr int V = REGISTERS / R >= 8 ? 8 : 4;
  int64_t column = 0;
  for (; column + V * VL <= DV; column += V * VL)
    add_values<R, V, true>(tile, row, column, page, keys, values);
  for (; column + VL <= DV; column += VL)
    add_values<R, 1, true>(tile, row, column, page, keys, values);
  if (column < DV) add_values<R, 1, false>(tile, row, column, page, keys, values);
}

AIOS_INLINE void add_page(Tile& tile, int page, int64_t keys, const KeyValue* values) {
  int row = 0;
  if constexpr (VL != 8)
    for (; row + 4 <= tile.rows; row += 4) add_rows<4>(tile, row, page, keys, values);
  for (; row + 2 <= tile.rows; row += 2) add_rows<2>(tile, row, page, keys, values);
  for (; row < tile.rows; ++row) add_rows<1>(tile, row, page, keys, values);
}

// Queries of `tokens` tokens from `first` on (all of sequence s) and the key/value head `head`.
AIOS_INLINE void start(Tile& tile, const Sizes* n, void* const* p, int64_t s, int64_t first,
                       int64_t tokens, int64_t head) {
  tile.rows = (int)tokens * GROUP;
  tile.context = *length_of(n, p, s);
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t t = first + r / GROUP;
    const int64_t position = tile.context - (*start_of(n, p, s + 1) - t);
    int64_t from = 0;
    if (WINDOW > 0) from = max(from, position - WINDOW + 1);
    if (CHUNK > 0) from = max(from, position / (CHUNK > 0 ? CHUNK : 1) * CHUNK);
    tile.from[r] = from;
    tile.to[r] = position;
    memcpy(tile.q[r], q_at(n, p, t, head * GROUP + r % GROUP), D * sizeof(float));
    memset(tile.out[r], 0, sizeof(tile.out[r]));
    memset(tile.sums[r], 0, sizeof(tile.sums[r]));
    tile.highest[r] = LOWEST;
  }
}

AIOS_INLINE void finish(Tile& tile, const Sizes* n, void* const* p, int64_t first, int64_t head) {
  for (int r = 0; r < tile.rows; ++r) {
    float sum = reduce_add(load(tile.sums[r])), factor = 1.0f;
    if (HAS_SINKS) {
      const float sink = *sink_at(n, p, head * GROUP + r % GROUP);
      const float highest = max(tile.highest[r], sink);
      factor = exp(tile.highest[r] - highest);
      sum = sum * factor + exp(sink - highest);
    }
    factor /= sum;
    float* out = out_at(n, p, first + r / GROUP, head * GROUP + r % GROUP);
    int64_t i = 0;
    for (; i + VL <= DV; i += VL) store(out + i, load(&tile.out[r][i]) * factor);
    if (i < DV) store(out + i, load(&tile.out[r][i]) * factor, DV - i);
  }
}

AIOS_INLINE void attend(Tile& tile, const Sizes* n, void* const* p, int64_t s, int64_t head) {
  const int64_t* table = pages_of(n, p, s);
  const int64_t last = tile.to[tile.rows - 1] / PAGE;
  for (int64_t page = tile.from[0] / PAGE; page <= last; page += AHEAD) {
    const int pages = (int)min((int64_t)AHEAD, last - page + 1);
    const KeyValue* keys[AHEAD];
    for (int i = 0; i < pages; ++i) keys[i] = k_at(n, p, table[page + i], head);
    dot_rows(tile, pages, keys);
    for (int i = 0; i < pages; ++i) {
      const int64_t first_key = (page + i) * PAGE;
      softmax_step(tile, first_key, i);
      const int64_t used = min((int64_t)PAGE, tile.context - first_key);
      add_page(tile, i, used, v_at(n, p, table[page + i], head));
    }
  }
}

// The sequence that owns token t; -1 for padding behind the last one.
AIOS_INLINE int64_t sequence_of(const Sizes* n, void* const* p, int64_t t) {
  int64_t low = 0, high = num_sequences(n);  // start of low <= t < start of high
  if (t >= *start_of(n, p, high)) return -1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (*start_of(n, p, middle) <= t) low = middle;
    else high = middle;
  }
  return low;
}

// Item = (key/value head, token), tokens fastest: neighbours in one tile share the keys and values.
AIOS_INLINE void paged_attention(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  Tile tile;
  const int64_t total = num_tokens(n);
  while (begin < end) {
    const int64_t head = begin / total, t = begin % total, s = sequence_of(n, p, t);
    int64_t tokens = 1;
    if (s >= 0) {
      tokens = min(min(end - begin, *start_of(n, p, s + 1) - t), (int64_t)TOKENS);
      start(tile, n, p, s, t, tokens, head);
      attend(tile, n, p, s, head);
      finish(tile, n, p, t, head);
    } else {
      for (int64_t h = 0; h < GROUP; ++h)
        memset(out_at(n, p, t, head * GROUP + h), 0, DV * sizeof(float));
    }
    begin += tokens;
  }
}

AIOS_INLINE int64_t paged_attention_items(const Sizes* n) { return KV_HEADS * num_tokens(n); }
