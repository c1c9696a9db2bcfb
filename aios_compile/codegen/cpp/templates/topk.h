// The K first of each row in descending (LARGEST) or ascending order, and their places.
//
// The text before this one defines Stored, K, LARGEST, HAS_VALUES, HAS_INDICES, num_rows(n),
// row_size(n), and for input, values and indices <name>_row(n, p, row) and <name>_step(n).

using Value = decltype(load1((const Stored*)nullptr));

// Whether `a` stands before `b`: never for equals, so that what came first stays first. A NaN is
// larger than every number.
AIOS_INLINE bool before(Value a, Value b) {
  if (LARGEST) return a > b || (a != a && b == b);
  return a < b || (a == a && b != b);
}

AIOS_INLINE int64_t place_of(Value x, const Value* best, int64_t filled) {
  int64_t low = 0, high = filled;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(x, best[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}

AIOS_INLINE int64_t topk_items(const Sizes* n) { return num_rows(n); }

AIOS_INLINE void topk(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  Value best[K];
  int64_t places[K];
  const int64_t size = row_size(n);
  for (int64_t row = begin; row < end; ++row) {
    const Stored* x = input_row(n, p, row);
    const int64_t step = input_step(n);
    int64_t filled = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Value value = load1(x + i * step);
      if (filled == K && !before(value, best[K - 1])) continue;
      const int64_t at = place_of(value, best, filled);
      filled += filled < K;
      for (int64_t j = filled - 1; j > at; --j) {
        best[j] = best[j - 1];
        places[j] = places[j - 1];
      }
      best[at] = value;
      places[at] = i;
    }
    if constexpr (HAS_VALUES)
      for (int64_t j = 0; j < K; ++j) store1(values_row(n, p, row) + j * values_step(n), best[j]);
    if constexpr (HAS_INDICES)
      for (int64_t j = 0; j < K; ++j)
        store1(indices_row(n, p, row) + j * indices_step(n), places[j]);
  }
}
