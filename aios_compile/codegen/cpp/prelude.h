// What every generated kernel includes: sizes, vectors of VL lanes, loads, stores, reductions.
//
// Vectors are GCC/Clang vector extensions, so the same text compiles for AVX-512 (VL = 16), AVX2
// (8), NEON (4) and a target without SIMD flags (4). Values in registers: float32 for f32, bf16
// and f16 storage (`vf`), int32 for i32 (`vi`), a mask of 0 / -1 lanes for bool (`vi`). int64 and
// double are scalar. A scalar function computes lane 0 of the vector function: bitwise the same
// value. No library headers beyond these: a kernel must compile in well under a second.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

extern "C" {
typedef struct { int64_t T, S, R, P; } Sizes;  // tokens, sequences, logit rows, page-table width
}

#define AIOS_INLINE static inline __attribute__((always_inline, unused))
#define AIOS_NOINLINE static __attribute__((noinline, unused))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VL 16
#define AIOS_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#define AIOS_AVX2 1
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint8_t vb __attribute__((vector_size(VL)));

struct bf16 { uint16_t bits; };  // storage only: arithmetic is in float
struct f16 { uint16_t bits; };
struct bool8 { uint8_t value; };  // 0 or 1

AIOS_INLINE vf splat(float x) { return x - vf{}; }  // not 0 + x: an add that no compiler may drop
AIOS_INLINE vi splat(int32_t x) { return vi{} + x; }
AIOS_INLINE vi splat(bool x) { return vi{} - (int32_t)x; }
AIOS_INLINE vi bits_of(vf x) { return (vi)x; }
AIOS_INLINE vf float_of_bits(vi x) { return (vf)x; }
AIOS_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

AIOS_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }  // toward zero

AIOS_INLINE vi lanes() {  // 0, 1, 2, ...
  vi r;
  for (int i = 0; i < VL; ++i) r[i] = i;
  return r;
}

AIOS_INLINE float lane_of(float x) { return x; }
AIOS_INLINE int32_t lane_of(int32_t x) { return x; }
AIOS_INLINE int32_t lane_of(bool x) { return -(int32_t)x; }

// ---- choices -----------------------------------------------------------------------------------
AIOS_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
AIOS_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }
template <class X> AIOS_INLINE X select(bool mask, X a, X b) { return mask ? a : b; }
AIOS_INLINE bool any(vi mask) {
#if AIOS_AVX512
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif AIOS_AVX2
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t r = 0;
  for (int i = 0; i < VL; ++i) r |= mask[i];
  return r != 0;
#endif
}
// NaN wins, as in torch.maximum and torch.minimum.
AIOS_INLINE vf max(vf a, vf b) { return ((a > b) | (a != a)) ? a : b; }
AIOS_INLINE vf min(vf a, vf b) { return ((a < b) | (a != a)) ? a : b; }
AIOS_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
AIOS_INLINE vi min(vi a, vi b) { return a < b ? a : b; }
template <class X> AIOS_INLINE X max(X a, X b) { return ((a > b) | (a != a)) ? a : b; }
template <class X> AIOS_INLINE X min(X a, X b) { return ((a < b) | (a != a)) ? a : b; }

// ---- fused multiply-add: one rounding on every target ------------------------------------------
AIOS_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
AIOS_INLINE vf fma(vf a, vf b, vf c) {
#if AIOS_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif AIOS_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  vf r;
  for (int i = 0; i < VL; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

// ---- half precision in storage -----------------------------------------------------------------
AIOS_INLINE vf widen_bf16(vh x) {
#if AIOS_AVX512  // GCC 12 converts in halves: five instructions more
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
  return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}
AIOS_INLINE vh narrow_bf16(vf x) {  // round to nearest even; NaN stays NaN
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((vu)(x != x ? (vi)quiet : (vi)rounded), vh);
}
AIOS_INLINE vf widen_f16(vh x) {
#if AIOS_AVX512
  return (vf)_mm512_cvtph_ps((__m256i)x);
#else
  vu u = __builtin_convertvector(x, vu);
  vu magnitude = (u & 0x7fffu) << 13;
  vf scaled = (vf)magnitude * 0x1p112f;  // exact, denormals too
  vi wide = (vi)(magnitude | 0x7f800000u);
  vi r = (magnitude >= (0x7c00u << 13)) ? wide : (vi)scaled;
  return (vf)(r | (vi)((u & 0x8000u) << 16));
#endif
}
AIOS_INLINE vh narrow_f16(vf x) {
#if AIOS_AVX512
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vu u = (vu)x, sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  vu normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  vu small = (vu)((vf)a + 0.5f) - 0x3f000000u;  // an ulp of 0.5 is the denormal step of f16
  vi r = (a < (113u << 23)) ? (vi)small : (vi)normal;
  r = (a >= 0x477ff000u) ? vi{} + 0x7c00 : r;  // 65520 and more round to infinity
  r = (a > 0x7f800000u) ? vi{} + 0x7e00 : r;
  return __builtin_convertvector((vu)r | sign, vh);
#endif
}

// ---- loads and stores of VL elements, and of the first `count` < VL of them (the rest reads 0) -
template <class V> AIOS_INLINE V load_as(const void* p) {
  V r;
  memcpy(&r, p, sizeof(V));
  return r;
}
template <class V, class X> AIOS_INLINE V load_as(const X* p, int64_t count) {
  V r = {};
  for (int64_t i = 0; i < count; ++i) memcpy((char*)&r + i * sizeof(X), p + i, sizeof(X));
  return r;
}
template <class V> AIOS_INLINE void store_as(void* p, V v) { memcpy(p, &v, sizeof(V)); }
template <class V, class X> AIOS_INLINE void store_as(X* p, V v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) memcpy((void*)(p + i), (char*)&v + i * sizeof(X), sizeof(X));
}

AIOS_INLINE vf load(const float* p) { return load_as<vf>(p); }
AIOS_INLINE vi load(const int32_t* p) { return load_as<vi>(p); }
AIOS_INLINE vf load(const bf16* p) { return widen_bf16(load_as<vh>(p)); }
AIOS_INLINE vf load(const f16* p) { return widen_f16(load_as<vh>(p)); }
AIOS_INLINE vi load(const bool8* p) {
  return __builtin_convertvector(load_as<vb>(p), vi) != 0;
}
AIOS_INLINE vf load(const bf16* p, int64_t count) { return widen_bf16(load_as<vh>(p, count)); }
AIOS_INLINE vf load(const f16* p, int64_t count) { return widen_f16(load_as<vh>(p, count)); }
AIOS_INLINE vi load(const bool8* p, int64_t count) {
  return __builtin_convertvector(load_as<vb>(p, count), vi) != 0;
}
AIOS_INLINE void store(float* p, vf v) { store_as(p, v); }
AIOS_INLINE void store(int32_t* p, vi v) { store_as(p, v); }
AIOS_INLINE void store(bf16* p, vf v) { store_as(p, narrow_bf16(v)); }
AIOS_INLINE void store(f16* p, vf v) { store_as(p, narrow_f16(v)); }
AIOS_INLINE void store(bool8* p, vi v) { store_as(p, __builtin_convertvector(v & 1, vb)); }
AIOS_INLINE void store(bf16* p, vf v, int64_t count) { store_as(p, narrow_bf16(v), count); }
AIOS_INLINE void store(f16* p, vf v, int64_t count) { store_as(p, narrow_f16(v), count); }
AIOS_INLINE void store(bool8* p, vi v, int64_t count) {
  store_as(p, __builtin_convertvector(v & 1, vb), count);
}
#if AIOS_AVX512 && !defined(__SANITIZE_ADDRESS__)  // it does not see masked accesses
AIOS_INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1u); }
AIOS_INLINE vf load(const float* p, int64_t count) {
  return (vf)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
AIOS_INLINE vi load(const int32_t* p, int64_t count) {
  return (vi)_mm512_maskz_loadu_epi32(first_lanes(count), p);
}
AIOS_INLINE void store(float* p, vf v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}
AIOS_INLINE void store(int32_t* p, vi v, int64_t count) {
  _mm512_mask_storeu_epi32(p, first_lanes(count), (__m512i)v);
}
#else
AIOS_INLINE vf load(const float* p, int64_t count) { return load_as<vf>(p, count); }
AIOS_INLINE vi load(const int32_t* p, int64_t count) { return load_as<vi>(p, count); }
AIOS_INLINE void store(float* p, vf v, int64_t count) { store_as(p, v, count); }
AIOS_INLINE void store(int32_t* p, vi v, int64_t count) { store_as(p, v, count); }
#endif

// `count` in a loop body is All for a full vector and a number for the last, partial one.
struct All {};
template <class X> AIOS_INLINE auto load(const X* p, All) { return load(p); }
template <class X, class V> AIOS_INLINE void store(X* p, V v, All) { store(p, v); }
template <class Body> AIOS_INLINE void for_lanes(int64_t low, int64_t high, Body body) {
  int64_t i = low;
  for (; i + VL <= high; i += VL) body(i, All());
  if (i < high) body(i, high - i);
}
AIOS_INLINE vf keep(vf x, All, float) { return x; }  // lanes past the end give `other`
AIOS_INLINE vf keep(vf x, int64_t count, float other) {
  return lanes() < (int32_t)count ? x : splat(other);
}

// One element, in the type of arithmetic.
AIOS_INLINE float load1(const float* p) { return *p; }
AIOS_INLINE double load1(const double* p) { return *p; }
AIOS_INLINE int64_t load1(const int64_t* p) { return *p; }
AIOS_INLINE int32_t load1(const int32_t* p) { return *p; }
AIOS_INLINE int32_t load1(const int16_t* p) { return *p; }
AIOS_INLINE int32_t load1(const int8_t* p) { return *p; }
AIOS_INLINE int32_t load1(const uint8_t* p) { return *p; }
AIOS_INLINE bool load1(const bool8* p) { return p->value != 0; }
AIOS_INLINE float load1(const bf16* p) {
  uint32_t u = (uint32_t)p->bits << 16;
  float r;
  memcpy(&r, &u, 4);
  return r;
}
AIOS_INLINE float load1(const f16* p) { return widen_f16(vh{} + p->bits)[0]; }
AIOS_INLINE void store1(float* p, float v) { *p = v; }
AIOS_INLINE void store1(double* p, double v) { *p = v; }
AIOS_INLINE void store1(int64_t* p, int64_t v) { *p = v; }
AIOS_INLINE void store1(int32_t* p, int32_t v) { *p = v; }
AIOS_INLINE void store1(int16_t* p, int32_t v) { *p = (int16_t)v; }
AIOS_INLINE void store1(int8_t* p, int32_t v) { *p = (int8_t)v; }
AIOS_INLINE void store1(uint8_t* p, int32_t v) { *p = (uint8_t)v; }
AIOS_INLINE void store1(bool8* p, bool v) { p->value = v; }
AIOS_INLINE void store1(bf16* p, float v) { p->bits = narrow_bf16(splat(v))[0]; }
AIOS_INLINE void store1(f16* p, float v) { p->bits = narrow_f16(splat(v))[0]; }

// Elements that lie `stride` apart.
AIOS_INLINE int64_t number_of(All) { return VL; }
AIOS_INLINE int64_t number_of(int64_t count) { return count; }
template <class X, class Count>
AIOS_INLINE auto load_strided(const X* p, int64_t stride, Count count) {
  decltype(load(p)) r = {};
  const int64_t end = number_of(count);
  for (int64_t i = 0; i < end; ++i) r[i] = lane_of(load1(p + i * stride));
  return r;
}
template <class X, class V, class Count>
AIOS_INLINE void store_strided(X* p, int64_t stride, V v, Count count) {
  const int64_t end = number_of(count);
  for (int64_t i = 0; i < end; ++i) store1(p + i * stride, v[i]);
}

// Rounding of an intermediate whose eager dtype is half precision.
AIOS_INLINE vf round_bf16(vf x) { return widen_bf16(narrow_bf16(x)); }
AIOS_INLINE vf round_f16(vf x) { return widen_f16(narrow_f16(x)); }
AIOS_INLINE float round_bf16(float x) { return round_bf16(splat(x))[0]; }
AIOS_INLINE float round_f16(float x) { return round_f16(splat(x))[0]; }

// ---- horizontal reductions: always the same tree, lane i with lane i + VL/2, and so on ---------
// Halves stay in registers: of a loop over an array GCC makes stores that the loads wait for.
typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
template <class Half, class X> AIOS_INLINE Half half_of(const X& x, int which) {
  Half half;
  memcpy(&half, (const char*)&x + which * sizeof(half), sizeof(half));
  return half;
}
template <class Join> AIOS_INLINE float reduce(v4 x, Join join) {
  x = join(x, v4{x[2], x[3], x[2], x[3]});
  return join(x, v4{x[1], x[1], x[1], x[1]})[0];
}
#if VL >= 8
template <class Join> AIOS_INLINE float reduce(v8 x, Join join) {
  return reduce(join(half_of<v4>(x, 0), half_of<v4>(x, 1)), join);
}
#endif
#if VL == 16
template <class Join> AIOS_INLINE float reduce(vf x, Join join) {
  const v8 low = (v8)_mm512_castps512_ps256((__m512)x);
  return reduce(join(low, (v8)_mm512_extractf32x8_ps((__m512)x, 1)), join);
}
#endif
#define AIOS_REDUCTION(name, expression) \
  AIOS_INLINE float name(vf x) { return reduce(x, [](auto p, auto q) { return expression; }); }
AIOS_REDUCTION(reduce_add, p + q)
AIOS_REDUCTION(reduce_mul, p * q)
AIOS_REDUCTION(reduce_max, max(p, q))
AIOS_REDUCTION(reduce_min, min(p, q))
#undef AIOS_REDUCTION

#include "prelude_math.h"
