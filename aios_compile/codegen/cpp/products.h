// What linears on float weights multiply: a row of a packed block by an element of a token.
//
// An Element is what one broadcast takes: a float, or a pair of bf16 (k and k + 1).
#pragma once
#include "prelude.h"

struct pair { uint16_t bits[2]; };  // bf16 of k and k + 1: one lane of a dot product

AIOS_INLINE vu load(const pair* p) { return load_as<vu>(p); }  // VL rows, a pair each

AIOS_INLINE vf add_product(vf rows, float x, vf sum) { return fma(rows, splat(x), sum); }

// sum + row[1] * x[1], then + row[0] * x[0], each rounded once, to nearest even. vdpbf16ps takes
// denormal operands and results as zeros; the plain path keeps them, and is the same bit for bit
// otherwise (Zen 4: a million random cases).
AIOS_INLINE vf add_product(vu rows, pair x, vf sum) {
  uint32_t both;
  memcpy(&both, &x, 4);
#if AIOS_AVX512 && defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)_mm512_set1_epi32(both));
#else
  const vf upper = float_of_bits((vi)(rows & 0xffff0000u)), lower = float_of_bits((vi)(rows << 16));
  const vf high = float_of_bits((vi)(vu{} + (both & 0xffff0000u)));
  return fma(lower, float_of_bits((vi)(vu{} + (both << 16))), fma(upper, high, sum));
#endif
}

// The elements of `count` values: as they are, or rounded to bf16 in pairs (the last may end in 0).
AIOS_INLINE void elements_of(const float* x, int64_t count, float* out) {
  memcpy(out, x, count * sizeof(float));
}
AIOS_INLINE void elements_of(const float* x, int64_t count, pair* out) {
  bf16* to = (bf16*)out;
  int64_t k = 0;
#if AIOS_AVX512 && defined(__AVX512BF16__)  // a denormal is zero already here, not in the product
  for (; k + VL <= count; k += VL)
    store_as(to + k, (vh)_mm512_cvtneps_pbh((__m512)load(x + k)));
#endif
  for_lanes(k, count, [&](int64_t i, auto lanes) { store(to + i, load(x + i, lanes), lanes); });
  if (count % 2) to[count].bits = 0;
}
