// Keys and values of a head of a token into its pages, rounded once.
AIOS_INLINE void put(const Sizes* n, void* const* p, int64_t page, int64_t h, int64_t offset,
                     const float* x, const float* values) {
  KeyValue* keys = key_page(n, p, page, h) + offset;  // transposed: an element a row of the page
  KeyValue rounded[D];
  for_lanes(0, D, [&](int64_t d, auto count) { store(rounded + d, load(x + d, count), count); });
  for (int64_t d = 0; d < D; ++d) keys[d * PAGE] = rounded[d];
  KeyValue* row = value_page(n, p, page, h) + offset * V_WIDTH;
  int64_t i = 0;
  for (; i + VL <= V_WIDTH; i += VL) store(row + i, load(values + i));
  if (i < V_WIDTH) store(row + i, load(values + i, V_WIDTH - i), V_WIDTH - i);
}
