// A mixture's matrix product: row p of out is x[p / choices] times the matrix of experts[p].
//
// The text before this one defines E, N, K, COLUMNS, HAS_BIAS, Weight, X, num_rows(n), num_pairs,
// x_row(n, p, m), weight_row(n, p, e, i), expert_at(n, p, i), bias_at(n, p, e, i), out_row(n, p, i)
// and out_step(n). Each element is one sum: lane l adds k = l, l + VL, ... and the lanes a tree.

constexpr int64_t NUM_BLOCKS = (N + COLUMNS - 1) / COLUMNS;
constexpr int TILE = VL == 8 ? 2 : 4;  // rows that share a loaded weight
constexpr int STREAMS = 4;             // columns whose weights are loaded together

template <int ROWS, int COLS>
AIOS_INLINE void tile(const Sizes* n, void* const* p, const int64_t* pairs, int64_t choices,
                      int64_t expert, int64_t column) {
  const X* x[ROWS];
  const Weight* w[COLS];
  vf sums[ROWS][COLS] = {};
  for (int r = 0; r < ROWS; ++r) x[r] = x_row(n, p, pairs[r] / choices);
  for (int c = 0; c < COLS; ++c) w[c] = weight_row(n, p, expert, column + c);
  for_lanes(0, K, [&](int64_t k, auto count) {
    vf right[COLS];
    for (int c = 0; c < COLS; ++c) right[c] = load(w[c] + k, count);
    for (int r = 0; r < ROWS; ++r) {
      const vf left = load(x[r] + k, count);
      for (int c = 0; c < COLS; ++c) sums[r][c] = fma(left, right[c], sums[r][c]);
    }
  });
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) {
      float sum = reduce_add(sums[r][c]);
      if constexpr (HAS_BIAS) sum += load1(bias_at(n, p, expert, column + c));
      store1(out_row(n, p, pairs[r]) + (column + c) * out_step(n), sum);
    }
}

template <int ROWS>
AIOS_NOINLINE void columns(const Sizes* n, void* const* p, const int64_t* pairs, int64_t choices,
                           int64_t expert, int64_t column, int64_t stop) {
  for (; column + STREAMS <= stop; column += STREAMS)
    tile<ROWS, STREAMS>(n, p, pairs, choices, expert, column);
  for (; column < stop; ++column) tile<ROWS, 1>(n, p, pairs, choices, expert, column);
}

AIOS_INLINE int64_t expert_linear_items(const Sizes* n) {
  return num_pairs(n) == 0 ? 0 : NUM_BLOCKS * E;
}

AIOS_INLINE void expert_linear(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const int64_t count = num_pairs(n), choices = count / num_rows(n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t expert = item % E, column = item / E * COLUMNS;
    const int64_t stop = min(column + COLUMNS, N);
    int64_t pairs[TILE];
    int64_t filled = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (expert_of<E>(load1(expert_at(n, p, i))) != expert) continue;
      pairs[filled++] = i;
      if (filled < TILE) continue;
      columns<TILE>(n, p, pairs, choices, expert, column, stop);
      filled = 0;
    }
    for (int64_t r = 0; r < filled; ++r)
      columns<1>(n, p, pairs + r, choices, expert, column, stop);
  }
}
