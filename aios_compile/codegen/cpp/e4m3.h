// e4m3: OCP's 8-bit float with 4 bits of exponent and 3 of mantissa; up to 448, no infinities, one
// NaN a sign (OCP 8-bit Floating Point Specification, 2023). Storage only: arithmetic is in float.
#pragma once
#include "prelude.h"

struct e4m3 { uint8_t bits; };

// Every code is a float: exact. Its bits, moved to their places in a float, mean the number over
// 2^120, subnormal numbers too; but 0x7f and 0xff, which are NaN.
AIOS_INLINE vf widen_e4m3(vb x) {
#if AIOS_AVX512
  const __m128i codes = (__m128i)x;  // sign-extended, the sign stands in several bits
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepi8_epi32(codes), 20);
  const __m512 small = (__m512)_mm512_and_si512(bits, _mm512_set1_epi32((int)0x87f00000));
  const __m128i sizes = _mm_or_si128(codes, _mm_set1_epi8((char)0x80));
  const __mmask16 numbers = _mm_cmpneq_epi8_mask(sizes, _mm_set1_epi8((char)0xff));
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  return (vf)_mm512_mask_mul_ps(nan, numbers, small, _mm512_set1_ps(0x1p120f));
#else
  const vu u = __builtin_convertvector(x, vu);
  const vi size = (vi)((u & 0x7fu) << 20);
  const vf wide = (vf)size * 0x1p120f;
  const vi r = size == (0x7f << 20) ? (vi)(u | 0x7fc00000u) : (vi)wide;
  return (vf)(r | (vi)((u & 0x80u) << 24));
#endif
}

// Nearest, halves to even; what is larger than 448, infinity too, becomes 448; NaN stays NaN.
AIOS_INLINE vb narrow_e4m3(vf x) {
  const vu u = (vu)x, sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
  const vu normal = (a - (120u << 23) + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  const vu small = (vu)((vf)a + 0x1p14f) - 0x46800000u;  // an ulp of 2^14 is the step below 2^-6
  vi r = (a < (121u << 23)) ? (vi)small : (vi)normal;
  r = (a >= 0x43e00000u) ? vi{} + 0x7e : r;
  r = (a > 0x7f800000u) ? vi{} + 0x7f : r;
  return __builtin_convertvector((vu)r | sign, vb);
}

AIOS_INLINE vf load(const e4m3* p) { return widen_e4m3(load_as<vb>(p)); }
AIOS_INLINE vf load(const e4m3* p, int64_t count) { return widen_e4m3(load_as<vb>(p, count)); }
AIOS_INLINE void store(e4m3* p, vf v) { store_as(p, narrow_e4m3(v)); }
