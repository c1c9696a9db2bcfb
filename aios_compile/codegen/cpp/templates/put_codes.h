// Keys and values of a head of a token into its pages as codes, int8 or e4m3, under one scale each:
// max|x| / LARGEST_CODE; 0 for values too small to tell from 0, NaN where there is one. The bits
// are those of the definition (quantize_groups in ir/quantized.py).

AIOS_INLINE void put_vector(int8_t* codes, vf x) {
  store_as(codes, __builtin_convertvector(nearest(x), vc));
}
template <class Code> AIOS_INLINE void put_vector(Code* codes, vf x) {  // e4m3
  store(codes, x == x ? x : splat(0.0f));  // NaN is in the scale
}

// codes[i] = x[i] * LARGEST_CODE / max|x|, to the nearest; returns the scale. Codes of a last,
// partial vector are zero behind COUNT.
template <int64_t COUNT>
AIOS_INLINE float to_codes(const float* x, KeyValue (&codes)[COUNT + VL]) {
  vi tops = {};
  for_lanes(0, COUNT, [&](int64_t i, auto lanes) {  // compared as whole numbers: NaN is the largest
    tops = Largest()(tops, bits_of(load(x + i, lanes)) & 0x7fffffff);
  });
  int32_t top = 0;
  for (int l = 0; l < VL; ++l) top = tops[l] > top ? tops[l] : top;
  float most;
  memcpy(&most, &top, sizeof(most));
  const bool dead = most < 0x1p-100f;
  const vf inverse = splat(dead ? 0.0f : LARGEST_CODE / most);
  for_lanes(0, COUNT, [&](int64_t i, auto lanes) {
    put_vector(codes + i, load(x + i, lanes) * inverse);
  });
  return dead ? 0.0f : most / LARGEST_CODE;
}

AIOS_INLINE void put(const Sizes* n, void* const* p, int64_t page, int64_t h, int64_t offset,
                     const float* x, const float* values) {
  KeyValue codes[D + VL], value_codes[V_WIDTH + VL];
  key_scales(n, p, page, h)[offset] = to_codes<D>(x, codes);
  KeyValue* keys = key_page(n, p, page, h) + offset;  // transposed: an element a row of the page
  for (int64_t d = 0; d < D; ++d) keys[d * PAGE] = codes[d];
  value_scales(n, p, page, h)[offset] = to_codes<V_WIDTH>(values, value_codes);
  memcpy(value_page(n, p, page, h) + offset * V_WIDTH, value_codes, V_WIDTH);
}
