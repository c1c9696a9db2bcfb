// Quantised linears: activations to int8, packed codes to bytes, and dot products of the two.
//
// All paths give the same bits: a dot product is a whole number, and what is done with it in float
// is the prelude's arithmetic, lane by lane.
#pragma once
#include "prelude.h"

#define AIOS_LOOP _Pragma("GCC unroll 16") for

typedef uint8_t vq __attribute__((vector_size(4 * VL)));  // VL rows x 4 k: one row is one lane
typedef int16_t vs __attribute__((vector_size(4 * VL)));
typedef int8_t vc __attribute__((vector_size(VL)));

// ---- activations: 32 values under one scale ----------------------------------------------------
AIOS_INLINE int32_t largest_lane(vi x) {
#if AIOS_AVX512
  return _mm512_reduce_max_epi32((__m512i)x);
#elif AIOS_AVX2
  __m128i a = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x),
                            _mm256_extracti128_si256((__m256i)x, 1));
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
#else
  int32_t r = x[0];
  for (int i = 1; i < VL; ++i) r = x[i] > r ? x[i] : r;
  return r;
#endif
}
AIOS_INLINE int32_t sum_of_lanes(vi x) {
#if AIOS_AVX512
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t r = 0;
  for (int i = 0; i < VL; ++i) r += x[i];
  return r;
#endif
}
AIOS_INLINE vi nearest(vf x) {  // whole numbers, halves to even
#if AIOS_AVX512
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif AIOS_AVX2
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  return to_int(round(x));
#endif
}

// Codes of x[0, 32) to `codes`; the sum of the first 16 and of the last 16 to `sums`. Returns the
// scale: max|x| / 127, 0 for values too small to tell from 0, NaN where there is one.
AIOS_INLINE float quantize32(const float* x, int8_t* codes, int32_t* sums) {
  constexpr int N = 32 / VL;
  vf values[N];
  vi top = {};
  AIOS_LOOP (int i = 0; i < N; ++i) {
    values[i] = load(x + i * VL);
    const vi magnitude = bits_of(values[i]) & 0x7fffffff;  // as whole numbers: NaN is the largest
    top = magnitude > top ? magnitude : top;
  }
  const int32_t bits = largest_lane(top);
  float most;
  memcpy(&most, &bits, 4);
  const bool live = !(most < 0x1p-100f);
  const float inverse = live ? 127.0f / most : 0.0f;
  vi low = {}, high = {};
  AIOS_LOOP (int i = 0; i < N; ++i) {
    const vi code = nearest(values[i] * inverse);
    (i < N / 2 ? low : high) += code;
    store_as(codes + i * VL, __builtin_convertvector(code, vc));
  }
  sums[0] = sum_of_lanes(low), sums[1] = sum_of_lanes(high);
  return live ? most / 127.0f : 0.0f;
}

// ---- codes: unit c holds k = 4 c .. 4 c + 3 of 16 rows, lane by lane ---------------------------
// `v` is the vector of the block. The layout is that of ir/quant_format.py, 16 rows side by side.
template <int BITS>
AIOS_INLINE vq unit_of(const uint8_t* group, int c, int v) {
  const auto at = [&](int unit) { return load_as<vu>(group + unit * 64 + v * (int)sizeof(vu)); };
  if constexpr (BITS == 8) return (vq)at(c);
  constexpr int COUNT = BITS == 4 ? 2 : BITS == 5 ? 8 : 4;  // units of four k that lie together
  constexpr int UNITS = COUNT / 2 + (BITS > 4);
  const int first = c / COUNT * UNITS, i = c % COUNT;
  const vu nibbles = at(first + i / 2);
  vu code = (i % 2 ? nibbles >> 4 : nibbles) & 0x0f0f0f0fu;
  if constexpr (BITS > 4) {
    constexpr int WIDTH = BITS - 4;
    const vu high = at(first + UNITS - 1);
    const vu placed = i * WIDTH <= 4 ? high << (4 - i * WIDTH) : high >> (i * WIDTH - 4);
    code |= placed & (BITS == 5 ? 0x10101010u : 0x30303030u);
  }
  return (vq)code;
}

// ---- dot products: sum over four k of u * x, u a code of a row, x a signed byte ----------------
#if defined(__AVX512VNNI__) && AIOS_AVX512
#define AIOS_DOT 1
AIOS_INLINE vi dot4(vi sum, vq u, int32_t x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, _mm512_set1_epi32(x));
}
#elif defined(__AVXVNNI__) && AIOS_AVX2
#define AIOS_DOT 1
AIOS_INLINE vi dot4(vi sum, vq u, int32_t x) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, _mm256_set1_epi32(x));
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define AIOS_DOT 1
#define AIOS_SIGNED_DOT 1
AIOS_INLINE vi dot4(vi sum, vq u, int32_t x) {
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)u, (int8x16_t)vdupq_n_s32(x));
}
#elif AIOS_AVX512 || AIOS_AVX2
#define AIOS_PAIRS 1  // sums of two products in 16 bits, which saturate
#define AIOS_SIGNED_DOT 1
AIOS_INLINE vs pairs(vq u, int32_t x) {
#if AIOS_AVX512
  return (vs)_mm512_maddubs_epi16((__m512i)u, _mm512_set1_epi32(x));
#else
  return (vs)_mm256_maddubs_epi16((__m256i)u, _mm256_set1_epi32(x));
#endif
}
AIOS_INLINE vs signed_pairs(vq w, int32_t x) {  // |w| * (sign of w) x
#if AIOS_AVX512
  const __m512i a = (__m512i)w, b = _mm512_set1_epi32(x);
  const __m512i turned = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), __m512i{}, b);
  return (vs)_mm512_maddubs_epi16(_mm512_abs_epi8(a), turned);
#else
  const __m256i a = (__m256i)w;
  return (vs)_mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(_mm256_set1_epi32(x), a));
#endif
}
AIOS_INLINE vi sum_pairs(vs x) {
#if AIOS_AVX512
  return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#else
  return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#endif
}
#else
#define AIOS_DOT 1
AIOS_INLINE vi dot4(vi sum, vq u, int32_t x) {
  const vu w = (vu)u;
  sum += (vi)(w & 255u) * (int32_t)(int8_t)x;
  sum += (vi)(w >> 8 & 255u) * (int32_t)(int8_t)(x >> 8);
  sum += (vi)(w >> 16 & 255u) * (int32_t)(int8_t)(x >> 16);
  return sum + (vi)(w >> 24) * (x >> 24);
}
#endif

#if AIOS_SIGNED_DOT
constexpr int SIGN_BIT = 128;  // codes of 8 bits are read as u - 128
#else
constexpr int SIGN_BIT = 0;
#endif

// What is added to dot products of codes so that they are those of the weights, times sum(x).
template <int BITS> constexpr int32_t offset_of(int low) {
  return BITS == 8 ? low + SIGN_BIT : low;
}

// The dot products of UNITS units from `first` on of BLOCKS blocks, with WIDTH tokens, onto sums.
// x[unit][WIDTH] are four signed bytes each.
template <int BITS, int UNITS, int BLOCKS, int WIDTH>
AIOS_INLINE void dots(const uint8_t* const (&groups)[BLOCKS], int first, const int32_t* x,
                      vi (&sums)[WIDTH][BLOCKS * (16 / VL)]) {
  constexpr int VECTORS = 16 / VL;
#if AIOS_DOT
  AIOS_LOOP (int c = 0; c < UNITS; ++c)
    AIOS_LOOP (int r = 0; r < BLOCKS * VECTORS; ++r) {
      vq u = unit_of<BITS>(groups[r / VECTORS], first + c, r % VECTORS);
      if (BITS == 8 && SIGN_BIT) u ^= 128;
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) sums[t][r] = dot4(sums[t][r], u, x[c * WIDTH + t]);
    }
#else
  // So many sums of pairs fit in 16 bits: two products of at most (2^BITS - 1) * 127 each.
  constexpr int FIT = BITS == 8 ? 1 : 32767 / (254 * ((1 << BITS) - 1));
  AIOS_LOOP (int r = 0; r < BLOCKS * VECTORS; ++r) {
    vs pending[WIDTH] = {};
    AIOS_LOOP (int c = 0; c < UNITS; ++c) {
      vq u = unit_of<BITS>(groups[r / VECTORS], first + c, r % VECTORS);
      if (BITS == 8) u ^= 128;
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
        const int32_t four = x[c * WIDTH + t];
        pending[t] += BITS == 8 ? signed_pairs(u, four) : pairs(u, four);
        if ((c + 1) % FIT == 0 || c + 1 == UNITS) {
          sums[t][r] += sum_pairs(pending[t]);
          pending[t] = vs{};
        }
      }
    }
  }
#endif
}

// ---- scales of VL rows as float32 --------------------------------------------------------------
AIOS_INLINE vf scales_at(const bf16* p) { return load(p); }
AIOS_INLINE vf scales_at(const f16* p) { return load(p); }
AIOS_INLINE vf scales_at(const float* p) { return load(p); }
AIOS_INLINE vf scales_at(const int8_t* p) {
  return to_float(__builtin_convertvector(load_as<vc>(p), vi));
}
AIOS_INLINE vf scales_at(const uint8_t* p) {
  return to_float(__builtin_convertvector(load_as<vb>(p), vi));
}
