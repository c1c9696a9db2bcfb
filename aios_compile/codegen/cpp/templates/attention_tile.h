// Paged attention with an online softmax: AHEAD pages a step, SPAN pages a partial result, partial
// results merged in ascending order. Steps and spans begin at fixed places of the sequence, so that
// a row's bits do not depend on its batch, its chunk of the prompt, the tile that computes it, or
// on whether the spans of a row are computed side by side.
//
// The text before this one defines KeyValue (float, bf16, f16 or int8_t), IN_CODES (int8_t: of each
// token and head there is a scale at key_scales_at and value_scales_at), HEADS, KV_HEADS, D, DV,
// PAGE, SCALE, SOFTCAP (0: none), WINDOW and CHUNK (0: none), HAS_SINKS, HAS_ALIBI and SLOPES of
// the query heads (added: slope * (key - query)), AHEAD and SPAN (pages), MAX_SPANS (1: never side
// by side), SPLIT_TOKENS, num_tokens(n), num_sequences(n), part_at(n, p, t, h, span) (a row of
// DV + 2 floats) and the addresses q_at, k_at, v_at, out_at, pages_of, start_of, length_of,
// sink_at.

constexpr int GROUP = HEADS / KV_HEADS;                 // query heads of one key/value head
constexpr int TOKENS = GROUP >= 32 ? 1 : 32 / GROUP;    // query tokens of a tile
constexpr int ROWS = TOKENS * GROUP;                    // row = token of the tile * GROUP + head
constexpr int PAGE_VECTORS = PAGE / VL;
constexpr int REGISTERS = VL == 8 ? 8 : 16;             // accumulators, leaving room for operands
constexpr int DV_VECTORS = (DV + VL - 1) / VL;
constexpr int WIDE = DV_VECTORS * VL;                   // row length of `out` in scratch
// finite: exp(LOWEST - LOWEST) is 1, not NaN
constexpr float LOWEST = -3.0e38f;

constexpr int64_t UNITS = 16;             // wanted of a split: enough for some threads
constexpr int64_t TOGETHER = 8;           // heads at most, for the stack's sake

struct Row {                              // a softmax-weighted sum of values, not yet normalised
  float sum, highest;
  alignas(64) float out[WIDE];
};

struct Tile {
  int rows;
  int64_t head;                           // its first query head
  int64_t context;                        // tokens of the sequence in the cache
  int64_t from[ROWS], to[ROWS];           // visible keys of each row, both ends included
  alignas(64) float q[ROWS][D];
  alignas(64) float scores[ROWS][AHEAD * PAGE];  // then probabilities
  alignas(64) float out[ROWS][WIDE];      // of the span so far, like the three that follow
  alignas(64) float sums[ROWS][VL];
  float highest[ROWS], rescale[ROWS];
};

// The pages of a step: [begin, end) of the AHEAD pages of a group, and the group that comes next.
struct Step {
  int begin, end;
  int64_t first_key;                      // of the group
  const KeyValue* keys[AHEAD];
  const KeyValue* values[AHEAD];
  const KeyValue* next_keys[AHEAD];       // of the group that follows, to be fetched
  const KeyValue* next_values[AHEAD];
  const float* key_scales[AHEAD];         // of int8 caches, a page each
  const float* value_scales[AHEAD];
};

// scores[row .. row + R)[page .. page + P) = q . k, over d ascending; the keys of a page are lanes.
template <int R, int P, bool FETCH>
AIOS_INLINE void dot(Tile& tile, int row, int page, const Step& step) {
  constexpr int ROW_BYTES = PAGE * (int)sizeof(KeyValue), DS = ROW_BYTES < 64 ? 64 / ROW_BYTES : 1;
  constexpr bool PAIRS = IN_PAIRS && P * PAGE_VECTORS % 2 == 0;
  vf acc[R][P * PAGE_VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < P * PAGE_VECTORS; ++i) acc[r][i] = splat(0.0f);
  const auto add = [&](int64_t d) __attribute__((always_inline)) {
    vf key[P * PAGE_VECTORS];
    if constexpr (PAIRS) {
#pragma GCC unroll 16
      for (int i = 0; i < P * PAGE_VECTORS; i += 2) {
        const KeyValue* row = step.keys[page + i / PAGE_VECTORS] + d * PAGE;
        const vu pairs = PAGE_VECTORS > 1 ? pairs_at(row + i % PAGE_VECTORS * VL)
                                          : pairs_of(row, step.keys[page + i + 1] + d * PAGE);
        key[i] = even_values(pairs), key[i + 1] = odd_values(pairs);
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < P * PAGE_VECTORS; ++i)
        key[i] = widened(step.keys[page + i / PAGE_VECTORS] + d * PAGE + i % PAGE_VECTORS * VL);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(tile.q[row + r][d]);
#pragma GCC unroll 16
      for (int i = 0; i < P * PAGE_VECTORS; ++i) acc[r][i] = fma(key[i], value, acc[r][i]);
    }
  };
  int64_t d = 0;
  for (; d + DS <= D; d += DS) {          // as many d as fill a cache line of a page
    if constexpr (FETCH)
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i)
        prefetch<DS * ROW_BYTES>(step.next_keys[page + i], d * PAGE);
#pragma GCC unroll 4
    for (int i = 0; i < DS; ++i) add(d + i);
  }
  for (; d < D; ++d) add(d);
  if constexpr (PAIRS)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < P * PAGE_VECTORS; i += 2) interleave(acc[r][i], acc[r][i + 1]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < P * PAGE_VECTORS; ++i)
      store(&tile.scores[row + r][page * PAGE + i * VL], acc[r][i]);
}

template <int R, bool FETCH>
AIOS_NOINLINE void dot_pages(Tile& tile, int row, const Step& step) {
  constexpr int FIT = REGISTERS / (R * PAGE_VECTORS);
  constexpr int P = FIT >= AHEAD ? AHEAD : FIT >= 2 ? 2 : 1;
  int page = step.begin;
  for (; page + P <= step.end; page += P) dot<R, P, FETCH>(tile, row, page, step);
  if constexpr (P > 1)
    for (; page < step.end; ++page) dot<R, 1, FETCH>(tile, row, page, step);
}

// The first rows of a tile fetch the next step's pages.
template <int R>
AIOS_INLINE void dot_some(Tile& tile, int row, const Step& step) {
  if (row == 0) dot_pages<R, true>(tile, row, step);
  else dot_pages<R, false>(tile, row, step);
}

AIOS_INLINE void dot_rows(Tile& tile, const Step& step) {
  int row = 0;
  for (; row + 8 <= tile.rows; row += 8) dot_some<8>(tile, row, step);
  for (; row + 4 <= tile.rows; row += 4) dot_some<4>(tile, row, step);
  for (; row + 2 <= tile.rows; row += 2) dot_some<2>(tile, row, step);
  for (; row < tile.rows; ++row) dot_some<1>(tile, row, step);
}

// Scores of a step -> probabilities relative to the highest score so far, times the scales of int8
// values. Unused slots may hold anything, NaN too: they are replaced, not multiplied by zero; what
// their values' scales make of it is not read.
AIOS_NOINLINE void softmax_step(Tile& tile, const Step& step) {
  const int begin = step.begin * PAGE, end = step.end * PAGE;
  for (int r = 0; r < tile.rows; ++r) {
    float* s = tile.scores[r];
    const int64_t from = tile.from[r] - step.first_key, to = tile.to[r] - step.first_key;
    tile.rescale[r] = 1.0f;
    if (to < begin || from >= end) {
      for (int i = begin; i < end; i += VL) store(s + i, splat(0.0f));
      continue;
    }
    const int32_t low = from > begin ? (int32_t)from : begin;
    const int32_t high = to < end ? (int32_t)to : end;
    vf top = splat(LOWEST);
    for (int i = begin; i < end; i += VL) {
      vf score = load(s + i);
      if (IN_CODES) score *= load(step.key_scales[i / PAGE] + i % PAGE);
      score *= SCALE;
      if (SOFTCAP != 0.0f) score = SOFTCAP * tanh(score / SOFTCAP);
      if constexpr (HAS_ALIBI)  // distances are exact in float32 below 2^24
        score += SLOPES[tile.head + r % GROUP] * to_float(lanes() + (i - (int32_t)to));
      if (i < low || i + VL - 1 > high) {
        const vi key = lanes() + i;
        score = select((key >= low) & (key <= high), score, splat(-kInfinity));
      }
      store(s + i, score);
      top = larger(top, score);  // a NaN that is lost here comes back with its probability
    }
    const float found = highest_lane(top);
    const float highest = found > tile.highest[r] ? found : tile.highest[r];
    if (highest != tile.highest[r]) tile.rescale[r] = exp(tile.highest[r] - highest);
    tile.highest[r] = highest;
    vf sum = load(tile.sums[r]) * tile.rescale[r];
    for (int i = begin; i < end; i += VL) {
      vf probability = exp_nonpositive(load(s + i) - highest);
      sum += probability;
      if (IN_CODES) probability *= load(step.value_scales[i / PAGE] + i % PAGE);
      store(s + i, probability);
    }
    store(tile.sums[r], sum);
  }
}

// out[row .. row + R)[V vectors] = out * rescale + probabilities . values, over the keys ascending.
// Values in pairs leave the columns of two vectors apart, even ones first; `settle` mends that.
template <int R, int V, bool FULL, bool FETCH>
AIOS_INLINE void add_values(Tile& tile, int row, int64_t column, const Step& step) {
  vf acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      acc[r][v] = load(&tile.out[row + r][column + v * VL]) * tile.rescale[row + r];
  for (int page = step.begin; page < step.end; ++page) {
    const int64_t first = page * PAGE;
    const int64_t keys = min((int64_t)PAGE, tile.context - step.first_key - first);
    for (int64_t j = 0; j < keys; ++j) {
      if constexpr (FETCH)
        prefetch<V * VL * (int)sizeof(KeyValue)>(step.next_values[page], j * DV + column);
      vf value[V];
      const KeyValue* at = step.values[page] + j * DV + column;
      if constexpr (IN_PAIRS && V > 1) {
#pragma GCC unroll 16
        for (int v = 0; v < V; v += 2) {
          const vu pairs = pairs_at(at + v * VL);
          value[v] = even_values(pairs), value[v + 1] = odd_values(pairs);
        }
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          value[v] = FULL ? widened(at + v * VL) : widened(at + v * VL, DV % VL);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf probability = splat(tile.scores[row + r][first + j]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] = fma(value[v], probability, acc[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(&tile.out[row + r][column + v * VL], acc[r][v]);
}

template <int R, bool FETCH>
AIOS_NOINLINE void add_rows(Tile& tile, int row, const Step& step) {
  constexpr int V = REGISTERS / R >= 8 ? 8 : 4;
  int64_t column = 0;
  for (; column + V * VL <= DV; column += V * VL)
    add_values<R, V, true, FETCH>(tile, row, column, step);
  for (; IN_PAIRS && column + 2 * VL <= DV; column += 2 * VL)
    add_values<R, 2, true, FETCH>(tile, row, column, step);
  for (; column + VL <= DV; column += VL)
    add_values<R, 1, true, FETCH>(tile, row, column, step);
  if (column < DV) add_values<R, 1, false, false>(tile, row, column, step);
}

template <int R>
AIOS_INLINE void add_some(Tile& tile, int row, const Step& step) {
  if (row == 0) add_rows<R, true>(tile, row, step);
  else add_rows<R, false>(tile, row, step);
}

AIOS_INLINE void add_step(Tile& tile, const Step& step) {
  int row = 0;
  if constexpr (VL != 8)
    for (; row + 4 <= tile.rows; row += 4) add_some<4>(tile, row, step);
  for (; row + 2 <= tile.rows; row += 2) add_some<2>(tile, row, step);
  for (; row < tile.rows; ++row) add_some<1>(tile, row, step);
}

// Columns of `out` in order, when a span is done.
AIOS_INLINE void settle(Tile& tile) {
  if constexpr (IN_PAIRS)
    for (int r = 0; r < tile.rows; ++r)
      for (int64_t column = 0; column + 2 * VL <= DV; column += 2 * VL) {
        float* at = &tile.out[r][column];
        vf even = load(at), odd = load(at + VL);
        interleave(even, odd);
        store(at, even), store(at + VL, odd);
      }
}

AIOS_INLINE void see(const Sizes* n, void* const* p, int64_t s, int64_t t, int64_t& from,
                     int64_t& to) {
  to = *length_of(n, p, s) - (*start_of(n, p, s + 1) - t);
  from = 0;
  if (WINDOW > 0) from = max(from, to - WINDOW + 1);
  if (CHUNK > 0) from = max(from, to / (CHUNK > 0 ? CHUNK : 1) * CHUNK);
}

AIOS_INLINE int64_t span_of(int64_t key) { return key / (SPAN * PAGE); }

// Queries of `tokens` tokens from `first` on (all of sequence s) and the key/value head `head`.
AIOS_INLINE void start(Tile& tile, const Sizes* n, void* const* p, int64_t s, int64_t first,
                       int64_t tokens, int64_t head) {
  tile.rows = (int)tokens * GROUP;
  tile.head = head * GROUP;
  tile.context = *length_of(n, p, s);
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t t = first + r / GROUP;
    see(n, p, s, t, tile.from[r], tile.to[r]);
    memcpy(tile.q[r], q_at(n, p, t, head * GROUP + r % GROUP), D * sizeof(float));
  }
}

// One span of the sequence for the heads [head, head + count), one tile each. Pages go outside,
// heads inside: the heads of a page lie side by side, and pages often do.
AIOS_NOINLINE void attend(Tile* tiles, const Sizes* n, void* const* p, int64_t s, int64_t head,
                          int count, int64_t span) {
  const int64_t* table = pages_of(n, p, s);
  const int64_t first = max(tiles->from[0] / PAGE, span * SPAN);
  const int64_t last = min(tiles->to[tiles->rows - 1] / PAGE, span * SPAN + SPAN - 1);
  for (int i = 0; i < count; ++i) {
    memset(tiles[i].out, 0, tiles[i].rows * sizeof(tiles[i].out[0]));
    memset(tiles[i].sums, 0, tiles[i].rows * sizeof(tiles[i].sums[0]));
    for (int r = 0; r < tiles[i].rows; ++r) tiles[i].highest[r] = LOWEST;
  }
  Step step;
  for (int64_t group = first / AHEAD * AHEAD; group <= last; group += AHEAD) {
    step.begin = (int)max(first - group, (int64_t)0);
    step.end = (int)min((int64_t)AHEAD, last - group + 1);
    step.first_key = group * PAGE;
    const bool over = group + AHEAD > last;  // then the heads that often follow
    for (int i = 0; i < count; ++i) {
      const bool same = i + 1 < count;
      for (int j = step.begin; j < step.end; ++j) {
        const int64_t page = table[group + j];
        const int64_t next = table[min((over ? first : group + AHEAD) + j, last)];
        const int64_t then = over ? min(head + count, (int64_t)KV_HEADS - 1) : head;
        step.keys[j] = k_at(n, p, page, head + i);
        step.values[j] = v_at(n, p, page, head + i);
        step.next_keys[j] = same ? k_at(n, p, page, head + i + 1) : k_at(n, p, next, then);
        step.next_values[j] = same ? v_at(n, p, page, head + i + 1) : v_at(n, p, next, then);
        if (!IN_CODES) continue;
        step.key_scales[j] = key_scales_at(n, p, page, head + i);
        step.value_scales[j] = value_scales_at(n, p, page, head + i);
        __builtin_prefetch(key_scales_at(n, p, same ? page : next, same ? head + i + 1 : then));
        __builtin_prefetch(value_scales_at(n, p, same ? page : next, same ? head + i + 1 : then));
      }
      dot_rows(tiles[i], step);
      softmax_step(tiles[i], step);
      add_step(tiles[i], step);
    }
  }
  for (int i = 0; i < count; ++i) settle(tiles[i]);
}

// row + (part_sum, part_highest, part_out), the part being of later keys.
AIOS_INLINE void merge(Row& row, float part_sum, float part_highest, const float* part_out) {
  const float highest = max(row.highest, part_highest);
  const float old = exp(row.highest - highest), now = exp(part_highest - highest);
  row.sum = row.sum * old + part_sum * now;
  row.highest = highest;
  int64_t i = 0;
  for (; i + VL <= DV; i += VL)
    store(row.out + i, load(row.out + i) * old + load(part_out + i) * now);
  if (i < DV) store(row.out + i, load(row.out + i) * old + load(part_out + i, DV - i) * now);
}

AIOS_INLINE void first_part(Row& row, float part_sum, float part_highest, const float* part_out) {
  row.sum = part_sum;
  row.highest = part_highest;
  memcpy(row.out, part_out, DV * sizeof(float));
}

AIOS_INLINE void finish(const Row& row, const Sizes* n, void* const* p, int64_t t, int64_t h) {
  float sum = row.sum, factor = 1.0f;
  if (HAS_SINKS) {
    const float sink = *sink_at(n, p, h), highest = max(row.highest, sink);
    factor = exp(row.highest - highest);
    sum = sum * factor + exp(sink - highest);
  }
  factor /= sum;
  float* out = out_at(n, p, t, h);
  int64_t i = 0;
  for (; i + VL <= DV; i += VL) store(out + i, load(row.out + i) * factor);
  if (i < DV) store(out + i, load(row.out + i) * factor, DV - i);
}
