// Who computes what of paged attention: tiles whole, or spans of tiles side by side.

// All spans of a tile, one after another.
AIOS_INLINE void attend_all(Tile& tile, Row* rows, const Sizes* n, void* const* p, int64_t s,
                            int64_t first, int64_t head) {
  const int64_t end = span_of(tile.to[tile.rows - 1]);
  for (int64_t span = span_of(tile.from[0]); span <= end; ++span) {
    attend(&tile, n, p, s, head, 1, span);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t from = span_of(tile.from[r]);
      if (span < from || span > span_of(tile.to[r])) continue;
      const float sum = reduce_add(load(tile.sums[r]));
      if (span == from) first_part(rows[r], sum, tile.highest[r], tile.out[r]);
      else merge(rows[r], sum, tile.highest[r], tile.out[r]);
    }
  }
  for (int r = 0; r < tile.rows; ++r)
    finish(rows[r], n, p, first + r / GROUP, head * GROUP + r % GROUP);
}

// One span of a tile: the result if it is the only one that a row sees, else a part for later.
AIOS_INLINE void attend_span(Tile* tiles, const Sizes* n, void* const* p, int64_t s, int64_t first,
                             int64_t tokens, int64_t head, int count, int64_t span) {
  for (int i = 0; i < count; ++i) start(tiles[i], n, p, s, first, tokens, head + i);
  attend(tiles, n, p, s, head, count, span);
  Row row;
  for (int i = 0; i < count; ++i) {
    const Tile& tile = tiles[i];
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t from = span_of(tile.from[r]), to = span_of(tile.to[r]);
      const int64_t t = first + r / GROUP, h = (head + i) * GROUP + r % GROUP;
      if (span < from || span > to) continue;
      const float sum = reduce_add(load(tile.sums[r]));
      if (from == to) {
        first_part(row, sum, tile.highest[r], tile.out[r]);
        finish(row, n, p, t, h);
        continue;
      }
      float* part = part_at(n, p, t, h, span);
      memcpy(part, tile.out[r], DV * sizeof(float));
      part[DV] = sum;
      part[DV + 1] = tile.highest[r];
    }
  }
}

// The sequence that owns token t; -1 for padding behind the last one.
AIOS_INLINE int64_t sequence_of(const Sizes* n, void* const* p, int64_t t) {
  int64_t low = 0, high = num_sequences(n);  // start of low <= t < start of high
  if (t >= *start_of(n, p, high)) return -1;
  if (t < high && *start_of(n, p, t) == t && *start_of(n, p, t + 1) > t) return t;  // one each
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (*start_of(n, p, middle) <= t) low = middle;
    else high = middle;
  }
  return low;
}

AIOS_INLINE void zero(const Sizes* n, void* const* p, int64_t t, int64_t head) {
  for (int64_t h = 0; h < GROUP; ++h)
    memset(out_at(n, p, t, head * GROUP + h), 0, DV * sizeof(float));
}

// A few tokens: units of (sequence, span, block of heads, token), tokens fastest. The items, whose
// number knows the sizes only, are shared out over the units, whose number knows the contexts.
struct Units {
  const Sizes* n;
  void* const* p;
  int64_t blocks = 1;                     // of heads; more when there is little else to share
  explicit Units(const Sizes* sizes, void* const* operands) : n(sizes), p(operands) {
    const int64_t units = max(total(), (int64_t)1), fitting = (KV_HEADS + TOGETHER - 1) / TOGETHER;
    blocks = min(max((UNITS + units - 1) / units, fitting), KV_HEADS);
  }
  int64_t tokens(int64_t s) const { return *start_of(n, p, s + 1) - *start_of(n, p, s); }
  void spans(int64_t s, int64_t& low, int64_t& high) const {
    int64_t from, to, unused;
    see(n, p, s, *start_of(n, p, s), from, unused);
    see(n, p, s, *start_of(n, p, s + 1) - 1, unused, to);
    low = span_of(from), high = span_of(to) + 1;
  }
  int64_t of(int64_t s) const {
    int64_t low, high;
    if (tokens(s) <= 0) return 0;
    spans(s, low, high);
    return (high - low) * blocks * tokens(s);
  }
  int64_t total() const {
    int64_t sum = 0;
    for (int64_t s = 0; s < num_sequences(n); ++s) sum += of(s);
    return sum;
  }
  bool several_spans() const {
    for (int64_t s = 0; s < num_sequences(n); ++s) {
      int64_t low, high;
      if (tokens(s) <= 0) continue;
      spans(s, low, high);
      if (high - low > 1) return true;
    }
    return false;
  }
  void run(int64_t begin, int64_t end) const {
    Tile tiles[KV_HEADS < TOGETHER ? KV_HEADS : TOGETHER];
    int64_t before = 0;
    for (int64_t s = 0; s < num_sequences(n) && before < end; ++s) {
      const int64_t count = of(s), width = tokens(s), stop = min(end - before, count);
      int64_t low = 0, high = 0;
      if (count) spans(s, low, high);
      for (int64_t u = max(begin - before, (int64_t)0); u < stop;) {
        const int64_t t = u % width, block = u / width % blocks, span = low + u / width / blocks;
        const int64_t together = min(min(stop - u, width - t), (int64_t)TOKENS);
        const int64_t head = KV_HEADS * block / blocks, next = KV_HEADS * (block + 1) / blocks;
        const int64_t first = *start_of(n, p, s) + t;
        attend_span(tiles, n, p, s, first, together, head, (int)(next - head), span);
        u += together;
      }
      before += count;
    }
  }
};

AIOS_INLINE bool split(const Sizes* n) { return MAX_SPANS > 1 && num_tokens(n) <= SPLIT_TOKENS; }

// Item = (key/value head, token), tokens fastest: neighbours in one tile share the keys and values.
AIOS_INLINE int64_t paged_attention_items(const Sizes* n) {
  return KV_HEADS * num_tokens(n) * (split(n) ? MAX_SPANS : 1);
}

AIOS_INLINE void paged_attention(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const int64_t total = num_tokens(n), items = paged_attention_items(n);
  if (split(n)) {
    if (begin == 0)
      for (int64_t t = *start_of(n, p, num_sequences(n)); t < total; ++t)
        for (int64_t head = 0; head < KV_HEADS; ++head) zero(n, p, t, head);
    const Units units(n, p);
    const int64_t count = units.total();
    units.run(begin * count / items, end * count / items);
    return;
  }
  Tile tile;
  Row rows[ROWS];
  while (begin < end) {
    const int64_t head = begin / total, t = begin % total, s = sequence_of(n, p, t);
    int64_t tokens = 1;
    if (s >= 0) {
      tokens = min(min(end - begin, *start_of(n, p, s + 1) - t), (int64_t)TOKENS);
      tokens = min(tokens, total - t);
      start(tile, n, p, s, t, tokens, head);
      attend_all(tile, rows, n, p, s, t, head);
    } else {
      zero(n, p, t, head);
    }
    begin += tokens;
  }
}

// Behind a barrier: the parts of the rows that see several spans. Item = (token, head).
AIOS_INLINE int64_t paged_attention_finish_items(const Sizes* n, void* const* p) {
  return split(n) && Units(n, p).several_spans() ? num_tokens(n) * HEADS : 0;
}

AIOS_INLINE void paged_attention_finish(const Sizes* n, void* const* p, int64_t begin,
                                        int64_t end) {
  Row row;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / HEADS, h = item % HEADS, s = sequence_of(n, p, t);
    if (s < 0) continue;
    int64_t from, to;
    see(n, p, s, t, from, to);
    if (span_of(from) == span_of(to)) continue;
    for (int64_t span = span_of(from); span <= span_of(to); ++span) {
      const float* part = part_at(n, p, t, h, span);
      if (span == span_of(from)) first_part(row, part[DV], part[DV + 1], part);
      else merge(row, part[DV], part[DV + 1], part);
    }
    finish(row, n, p, t, h);
  }
}
