// The steps of paged attention: scores, softmax, values; tiles over spans; parts put together.

template <int R, bool FETCH>
AIOS_NOINLINE void dot_pages(Tile& tile, int row, const Step& step) {
  constexpr int FIT = REGISTERS / (R * PAGE_VECTORS * SUMS);
  constexpr int P = FIT >= AHEAD ? AHEAD : FIT >= 2 ? 2 : 1;
  int page = step.begin;
  for (; page + P <= step.end; page += P) dot<R, P, FETCH>(tile, row, page, step);
  if constexpr (P > 2)  // side by side: a page alone waits for its sums
    for (; page + 2 <= step.end; page += 2) dot<R, 2, FETCH>(tile, row, page, step);
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

// Scores of a step -> probabilities relative to the highest score so far. Unused slots may hold
// anything, NaN too: they are replaced, not multiplied by zero.
AIOS_NOINLINE void softmax_step(Tile& tile, const Step& step) {
  const int begin = step.begin * PAGE, end = step.end * PAGE;
  for (int r = 0; r < tile.rows; ++r) {
    float* s = tile.scores[r];
    const int64_t from = tile.from[r] - step.first_key, to = tile.to[r] - step.first_key;
    tile.rescale[r] = 1.0f;
    if (to < begin || from >= end) {
      weigh_nothing(tile, r, begin, end);
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
    if (highest != tile.highest[r])  // the first step: exp would give 0
      tile.rescale[r] = tile.highest[r] == LOWEST ? 0.0f : exp(tile.highest[r] - highest);
    tile.highest[r] = highest;
    const vf sum = load(tile.sums[r]) * tile.rescale[r];
    store(tile.sums[r], weigh(tile, r, begin, end, highest, sum, step));
  }
}

template <int R, bool FETCH>
AIOS_NOINLINE void add_rows(Tile& tile, int row, const Step& step) {
  constexpr int V = COLUMNS<R>, WHOLE = DV / VL;
  int64_t column = 0;
  for (; column + V * VL <= DV; column += V * VL)
    add_values<R, V, true, FETCH>(tile, row, column, step);
  if constexpr (WHOLE % V >= 4)
    for (; column + 4 * VL <= DV; column += 4 * VL)
      add_values<R, 4, true, FETCH>(tile, row, column, step);
  if constexpr (WHOLE % 4 > 1)
    for (; column + 2 * VL <= DV; column += 2 * VL)
      add_values<R, 2, true, FETCH>(tile, row, column, step);
  if constexpr (WHOLE % 2 > 0) {
    add_values<R, 1, true, FETCH>(tile, row, column, step);
    column += VL;
  }
  if constexpr (DV % VL != 0) add_values<R, 1, false, false>(tile, row, column, step);
}

template <int R>
AIOS_INLINE void add_some(Tile& tile, int row, const Step& step) {
  if (row == 0) add_rows<R, true>(tile, row, step);
  else add_rows<R, false>(tile, row, step);
}

AIOS_INLINE void add_step(Tile& tile, const Step& step) {
  int row = 0;
  if constexpr (MOST_ROWS >= 4)
    for (; row + 4 <= tile.rows; row += 4) add_some<4>(tile, row, step);
  for (; row + 2 <= tile.rows; row += 2) add_some<2>(tile, row, step);
  for (; row < tile.rows; ++row) add_some<1>(tile, row, step);
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
    take_query(tile, r, q_at(n, p, t, head * GROUP + r % GROUP));
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
    for (int r = 0; r < tiles[i].rows; ++r) {
      for (int j = 0; j < WIDE; j += VL) store(tiles[i].out[r] + j, splat(0.0f));
      store(tiles[i].sums[r], splat(0.0f));
      tiles[i].highest[r] = LOWEST;
    }
  }
  Step step;
  for (int64_t group = first / AHEAD * AHEAD; group <= last; group += AHEAD) {
    step.begin = (int)max(first - group, (int64_t)0);
    step.end = (int)min((int64_t)AHEAD, last - group + 1);
    step.first_key = group * PAGE;
    for (int i = 0; i < count; ++i) {
      const bool same = i + 1 < count, over = !same && group + AHEAD > last;
      // behind the last step come the heads that often follow
      const int64_t base = same ? group : over ? first : group + AHEAD;
      const int64_t next_head = same ? head + i + 1 : over ? min(head + count, KV_HEADS - 1) : head;
      for (int j = step.begin; j < step.end; ++j) {
        const int64_t page = table[group + j], next = table[min(base + j, last)];
        step.keys[j] = k_at(n, p, page, head + i);
        step.values[j] = v_at(n, p, page, head + i);
        step.next_keys[j] = k_at(n, p, next, next_head);
        step.next_values[j] = v_at(n, p, next, next_head);
        if (!IN_CODES) continue;
        step.key_scales[j] = key_scales_at(n, p, page, head + i);
        step.value_scales[j] = value_scales_at(n, p, page, head + i);
        __builtin_prefetch(key_scales_at(n, p, next, next_head));
        __builtin_prefetch(value_scales_at(n, p, next, next_head));
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
