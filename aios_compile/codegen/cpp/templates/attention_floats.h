// Products of attention in float32: queries and probabilities as they are, keys and values widened.

constexpr int SUMS = 1;                  // accumulators of a row and a vector
constexpr int MOST_ROWS = VL == 8 ? 2 : 4;  // of add_values
template <int R> constexpr int COLUMNS = REGISTERS / R >= 8 && DV >= 8 * VL ? 8 : 4;  // vectors

AIOS_INLINE void take_query(Tile& tile, int r, const float* q) {
  memcpy(tile.q[r], q, D * sizeof(float));
}

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

// Scores [begin, end) of a row -> probabilities relative to `highest`, times the scales of codes;
// what the scales of unused slots make of theirs is not read. Returns sum + the probabilities.
AIOS_INLINE vf weigh(Tile& tile, int r, int begin, int end, float highest, vf sum,
                     const Step& step) {
  float* s = tile.scores[r];
  for (int i = begin; i < end; i += VL) {
    vf probability = exp_nonpositive(load(s + i) - highest);
    sum += probability;
    if (IN_CODES) probability *= load(step.value_scales[i / PAGE] + i % PAGE);
    store(s + i, probability);
  }
  return sum;
}

AIOS_INLINE void weigh_nothing(Tile& tile, int r, int begin, int end) {
  for (int i = begin; i < end; i += VL) store(tile.scores[r] + i, splat(0.0f));
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
      const KeyValue* at = step.values[page] + j * DV + column;
      vf value[V];
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
