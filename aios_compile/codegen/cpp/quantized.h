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
struct Largest { vi operator()(vi a, vi b) const { return a > b ? a : b; } };
struct Sum { vi operator()(vi a, vi b) const { return a + b; } };

// Lanes of (x, y): the lower and the upper halves of each run of `WIDTH` lanes, x's before y's.
template <int WIDTH> struct Halves {
  alignas(64) int32_t low[VL] = {}, high[VL] = {};
  constexpr Halves() {
    for (int l = 0; l < VL; ++l) {
      low[l] = l - l % WIDTH + l % (WIDTH / 2) + (l % WIDTH >= WIDTH / 2 ? VL : 0);
      high[l] = low[l] + WIDTH / 2;
    }
  }
};
template <int WIDTH> constexpr Halves<WIDTH> HALVES;

AIOS_INLINE vi shuffle(vi x, vi y, const int32_t (&from)[VL]) {
#if defined(__clang__)
  vi r;
  for (int l = 0; l < VL; ++l) r[l] = from[l] < VL ? x[from[l]] : y[from[l] - VL];
  return r;
#else
  return __builtin_shuffle(x, y, load_as<vi>(from));
#endif
}

// Lane l of the result: the reduction of all lanes of m[l]. Halves of two vectors are put side by
// side and joined, then quarters, and so on: VL - 1 steps for VL reductions.
template <int WIDTH = VL, class Join> AIOS_INLINE vi reduce_each(vi (&m)[VL], Join join) {
  if constexpr (WIDTH > 1) {
    AIOS_LOOP (int i = 0; i < WIDTH / 2; ++i) {
      const vi x = m[i], y = m[i + WIDTH / 2];
      m[i] = join(shuffle(x, y, HALVES<WIDTH>.low), shuffle(x, y, HALVES<WIDTH>.high));
    }
    reduce_each<WIDTH / 2>(m, join);
  }
  return m[0];
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

// COUNT groups of 32 (at most VL) of x: their codes, scales (max|x| / 127; 0 for values too small
// to tell from 0, NaN where there is one) and, for each STEP (16 or 32) values, the codes' sum.
template <int STEP, int COUNT>
AIOS_INLINE void quantize_groups(const float* x, int8_t* codes, float* scales, int32_t* sums) {
  constexpr int N = 32 / VL, HALF = STEP == 32 ? N : N / 2;  // vectors of a group, of a sum
  vi tops[VL] = {};
  AIOS_LOOP (int g = 0; g < COUNT; ++g)
    AIOS_LOOP (int i = 0; i < N; ++i)  // compared as whole numbers: NaN is the largest
      tops[g] = Largest()(tops[g], bits_of(load(x + g * 32 + i * VL)) & 0x7fffffff);
  const vf most = float_of_bits(reduce_each(tops, Largest()));
  const vi dead = most < 0x1p-100f;
  const vf scale = dead ? vf{} : most / 127.0f, inverse = dead ? vf{} : 127.0f / most;
  vi low[VL] = {}, high[VL] = {};
  AIOS_LOOP (int g = 0; g < COUNT; ++g)
    AIOS_LOOP (int i = 0; i < N; ++i) {
      const vi code = nearest(load(x + g * 32 + i * VL) * inverse[g]);
      (i < HALF ? low : high)[g] += code;
      store_as(codes + g * 32 + i * VL, __builtin_convertvector(code, vc));
    }
  const vi first = reduce_each(low, Sum()), second = STEP == 32 ? vi{} : reduce_each(high, Sum());
  AIOS_LOOP (int g = 0; g < COUNT; ++g) {
    scales[g] = scale[g];
    sums[STEP == 32 ? g : 2 * g] = first[g];
    if (STEP == 16) sums[2 * g + 1] = second[g];
  }
}

// The same for `count` values of a token, a multiple of 32.
template <int STEP>
AIOS_INLINE void quantize_row(const float* x, int64_t count, int8_t* codes, float* scales,
                              int32_t* sums) {
  const int64_t groups = count / 32;
  int64_t g = 0;
  for (; g + VL <= groups; g += VL)
    quantize_groups<STEP, VL>(x + g * 32, codes + g * 32, scales + g, sums + g * (32 / STEP));
  for (; g + VL / 2 <= groups; g += VL / 2)
    quantize_groups<STEP, VL / 2>(x + g * 32, codes + g * 32, scales + g, sums + g * (32 / STEP));
  for (int64_t rest = groups % (VL / 2); rest > 0; --rest, ++g)
    quantize_groups<STEP, 1>(x + g * 32, codes + g * 32, scales + g, sums + g * (32 / STEP));
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

// The dot products of UNITS units from `first` on of COUNT vectors (of blocks `stride` bytes apart)
// with WIDTH tokens, onto sums. x[token * STRIDE + unit] are four signed bytes each.
template <int BITS, int UNITS, int64_t STRIDE, int WIDTH, int COUNT>
AIOS_INLINE void dots(const uint8_t* group, int64_t stride, int first, const int32_t* x,
                      vi (&sums)[WIDTH][COUNT]) {
  constexpr int VECTORS = 16 / VL;
#if AIOS_DOT
  AIOS_LOOP (int c = 0; c < UNITS; ++c) {
    vq u[COUNT];
    AIOS_LOOP (int r = 0; r < COUNT; ++r) {
      u[r] = unit_of<BITS>(group + r / VECTORS * stride, first + c, r % VECTORS);
      if (BITS == 8 && SIGN_BIT) u[r] ^= 128;
    }
    AIOS_LOOP (int t = 0; t < WIDTH; ++t)
      AIOS_LOOP (int r = 0; r < COUNT; ++r)
        sums[t][r] = dot4(sums[t][r], u[r], x[t * STRIDE + c]);
  }
#else
  // So many sums of pairs fit in 16 bits: two products of at most (2^BITS - 1) * 127 each.
  constexpr int FIT = BITS == 8 ? 1 : 32767 / (254 * ((1 << BITS) - 1));
  AIOS_LOOP (int r = 0; r < COUNT; ++r) {
    vs pending[WIDTH] = {};
    AIOS_LOOP (int c = 0; c < UNITS; ++c) {
      vq u = unit_of<BITS>(group + r / VECTORS * stride, first + c, r % VECTORS);
      if (BITS == 8) u ^= 128;
      AIOS_LOOP (int t = 0; t < WIDTH; ++t) {
        const int32_t four = x[t * STRIDE + c];
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
