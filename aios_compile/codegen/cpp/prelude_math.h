// Vector math in float32: within 3 ulp of the exact value wherever it is a normal number, right
// at infinities and NaN, the same bits on every target (only +, -, *, /, sqrt, fma and integer
// steps). Polynomials: interpolation at Chebyshev nodes in 40 digits, coefficients rounded to
// float32, over the interval named at each; errors are asserted by tests/codegen/test_prelude.py.
// Reductions: Cody and Waite, "Software Manual for the Elementary Functions" (1980); log as in
// Tang, "Table-driven implementation of the logarithm function" (1990), without the table.
#pragma once

#define AIOS_SCALAR(f) \
  AIOS_NOINLINE float f(float x) { return f(splat(x))[0]; }
// Rare functions go through libm's double lane by lane: right, and not worth a vector version.
#define AIOS_RARE(f, expression)                      \
  AIOS_NOINLINE float f(float value) {                \
    double x = value;                                 \
    return (float)(expression);                       \
  }                                                   \
  AIOS_NOINLINE void f##_lanes(float* a) {            \
    for (int i = 0; i < VL; ++i) a[i] = f(a[i]);      \
  }                                                   \
  AIOS_INLINE vf f(vf x) {                            \
    float a[VL];                                      \
    memcpy(a, &x, sizeof(a));                         \
    f##_lanes(a);                                     \
    return load(a);                                   \
  }

static const float kInfinity = __builtin_inff();
static const float kNan = __builtin_nanf("");

AIOS_INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
AIOS_INLINE float absolute(float x) { return __builtin_fabsf(x); }
AIOS_INLINE double absolute(double x) { return __builtin_fabs(x); }
AIOS_INLINE vi absolute(vi x) { return x < 0 ? -x : x; }
AIOS_INLINE int32_t absolute(int32_t x) { return x < 0 ? -x : x; }
AIOS_INLINE int64_t absolute(int64_t x) { return x < 0 ? -x : x; }
AIOS_INLINE vf copysign(vf x, vf sign) {
  return (vf)(((vi)x & 0x7fffffff) | ((vi)sign & INT32_MIN));
}
AIOS_INLINE vf sqrt(vf x) {
#if AIOS_AVX512
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif AIOS_AVX2
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf r;
  for (int i = 0; i < VL; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}
AIOS_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
AIOS_INLINE vf rsqrt(vf x) { return 1.0f / sqrt(x); }
AIOS_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

// ---- rounding to whole numbers: |x| >= 2^23 is whole already -----------------------------------
AIOS_INLINE vf round(vf x) {  // halves to even
  vf a = absolute(x);
  return copysign(a < 0x1p23f ? (a + 0x1p23f) - 0x1p23f : a, x);
}
AIOS_INLINE vf floor(vf x) {
  vf r = round(x);
  return copysign(r > x ? r - 1.0f : r, x);
}
AIOS_INLINE vf ceil(vf x) {
  vf r = round(x);
  return copysign(r < x ? r + 1.0f : r, x);
}
AIOS_INLINE vf trunc(vf x) { return copysign(floor(absolute(x)), x); }
AIOS_SCALAR(round)
AIOS_SCALAR(floor)
AIOS_SCALAR(ceil)
AIOS_SCALAR(trunc)

// ---- exponentials ------------------------------------------------------------------------------
AIOS_INLINE vf power_of_two(vi k) { return (vf)((k + 127) << 23); }  // -127 < k < 128
AIOS_INLINE vf exp_tail(vf r) {  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: 1.4e-7
  vf p = splat(0x1.6d117cp-10f);
  p = fma(p, r, splat(0x1.120be2p-7f));
  p = fma(p, r, splat(0x1.555518p-5f));
  p = fma(p, r, splat(0x1.5554dcp-3f));
  return fma(p, r, splat(0.5f));
}
AIOS_INLINE vf split_exp(vf x, vi* k) {  // x = k ln(2) + r
  const float magic = 0x1.8p23f;         // adding it rounds to a whole number in the low bits
  vf t = fma(x, splat(0x1.715476p0f), splat(magic));
  vf n = t - magic;
  *k = (vi)t - (vi)splat(magic);
  return fma(n, splat(0x1.05c61p-29f), fma(n, splat(-0x1.62e43p-1f), x));
}
AIOS_INLINE vf exp(vf x) {
  vi k;
  vf r = split_exp(min(max(x, splat(-104.0f)), splat(89.0f)), &k);
  vf p = fma(r * r, exp_tail(r), r) + 1.0f;
  vi half = k >> 1;  // two steps: 2^k itself may overflow or be denormal
  return p * power_of_two(half) * power_of_two(k - half);
}
AIOS_INLINE vf larger(vf a, vf b) {  // b where either is NaN: one instruction, unlike max
#if AIOS_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif AIOS_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
AIOS_INLINE vf exp_nonpositive(vf x) {  // of x <= 0 or NaN; 0 below -87, where no sum notices it
  const float magic = 0x1.8p23f, least = -87.0f;
  vf c = larger(splat(least), x);
  vf t = fma(c, splat(0x1.715476p0f), splat(magic)), n = t - magic;
  vf r = fma(n, splat(0x1.05c61p-29f), fma(n, splat(-0x1.62e43p-1f), c));
  vf p = fma(r * r, exp_tail(r), r) + 1.0f;
  vf y = p * (vf)(((vi)t << 23) + 0x3f800000);  // the low bits of t are those of a whole number
  return x < least ? vf{} : y;
}
AIOS_INLINE vf exp2(vf x) {
  vf c = min(max(x, splat(-151.0f)), splat(129.0f));
  vf n = round(c);
  vi k = (vi)(n + 0x1.8p23f) - (vi)splat(0x1.8p23f);
  vf r = (c - n) * 0x1.62e43p-1f;
  vf p = fma(r * r, exp_tail(r), r) + 1.0f;
  vi half = k >> 1;
  return p * power_of_two(half) * power_of_two(k - half);
}
AIOS_INLINE vf expm1(vf x) {
  vi k;
  vf r = split_exp(min(max(x, splat(-20.0f)), splat(89.0f)), &k);
  vf p = fma(r * r, exp_tail(r), r);
  vf h = power_of_two(k - 1);
  return k == 0 ? p : 2.0f * fma(h, p, h - 0.5f);
}
AIOS_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
AIOS_INLINE vf tanh(vf x) {
  vf t = expm1(2.0f * min(absolute(x), splat(10.0f)));
  return copysign(t / (t + 2.0f), x);
}
AIOS_SCALAR(exp)
AIOS_SCALAR(exp2)
AIOS_SCALAR(expm1)
AIOS_SCALAR(sigmoid)
AIOS_SCALAR(tanh)

// ---- logarithms --------------------------------------------------------------------------------
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); returns log(m) as f - rest with f = m - 1.
AIOS_INLINE vf split_log(vf x, vf* e, vf* rest) {
  vi tiny = x < 0x1p-126f;
  vi u = (vi)(tiny ? x * 0x1p23f : x) - 0x3f3504f3;
  *e = to_float((u >> 23) - (tiny & 23));
  vf f = (vf)((u & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vf s = f / (f + 2.0f), z = s * s;  // log(1 + f) = 2 atanh(s)
  vf p = splat(0x1.ddd172p-3f);      // |s| <= 0.1716: 1.7e-9
  p = fma(p, z, splat(0x1.245c38p-2f));
  p = fma(p, z, splat(0x1.9999ecp-2f));
  p = fma(p, z, splat(0x1.555556p-1f));
  vf h = 0.5f * f * f;
  *rest = h - s * (h + z * p);
  return f;
}
AIOS_INLINE vf log_edges(vf x, vf r) {
  r = x == kInfinity ? x : r;
  r = x == 0.0f ? splat(-kInfinity) : r;
  return ((x < 0.0f) | (x != x)) ? splat(kNan) : r;
}
AIOS_INLINE vf log(vf x) {
  vf e, rest;
  vf f = split_log(x, &e, &rest);
  vf low = fma(e, splat(0x1.7f7d1cp-20f), -rest);  // ln(2) in two parts; the first has 17 bits
  return log_edges(x, fma(e, splat(0x1.62e4p-1f), low + f));
}
AIOS_INLINE vf log2(vf x) {
  vf e, rest;
  vf f = split_log(x, &e, &rest);
  vf m = f - rest, lost = (f - m) - rest;  // log(m) = m + lost
  vf low = fma(m, splat(0x1.4ae0c0p-26f), lost * 0x1.715476p0f);  // 1 / ln(2) in two parts
  return log_edges(x, e + fma(m, splat(0x1.715476p0f), low));
}
AIOS_INLINE vf log1p(vf x) {
  vf u = 1.0f + x;
  vf lost = (x - (u - 1.0f)) / u;  // what the sum lost, to first order
  return log(u) + (((u == kInfinity) | (u == 0.0f)) ? vf{} : lost);
}
AIOS_SCALAR(log)
AIOS_SCALAR(log2)
AIOS_SCALAR(log1p)
AIOS_RARE(log10, __builtin_log10(x))

// ---- sine and cosine: |x| <= 2^20 by three parts of pi/2, beyond by libm's double --------------
AIOS_NOINLINE void large_angles(const float* x, float* r, int quarter) {
  for (int i = 0; i < VL; ++i)
    if (!(__builtin_fabsf(x[i]) <= 0x1p20f))
      r[i] = (float)(quarter ? __builtin_cos((double)x[i]) : __builtin_sin((double)x[i]));
}
AIOS_INLINE vf sin_quarter(vf x, int quarter) {  // sin(x + quarter pi/2)
  const float magic = 0x1.8p23f;
  vf t = fma(x, splat(0x1.45f306p-1f), splat(magic));
  vf n = t - magic;
  vi q = (vi)t + quarter;
  vf r = fma(n, splat(-0x1.921fb6p0f), x);  // exact
  r = fma(n, splat(0x1.777a5cp-25f), r);
  r = fma(n, splat(0x1.ee59dap-50f), r);
  vf z = r * r;
  vf s = splat(0x1.6db8acp-19f);  // z <= 0.62: 2e-10
  s = fma(s, z, splat(-0x1.a01396p-13f));
  s = fma(s, z, splat(0x1.11110ep-7f));
  s = fma(s, z, splat(-0x1.555556p-3f));
  s = fma(s * z, r, r);
  vf c = splat(-0x1.2520bap-22f);  // z <= 0.62: 6e-11
  c = fma(c, z, splat(0x1.a015bap-16f));
  c = fma(c, z, splat(-0x1.6c16c0p-10f));
  c = fma(c, z, splat(0x1.555556p-5f));
  c = fma(c * z, z, fma(z, splat(-0.5f), splat(1.0f)));
  vf y = (q & 1) != 0 ? c : s;
  y = (vf)((vi)y ^ ((q & 2) << 30));
  vi large = ~(absolute(x) <= 0x1p20f);
  if (__builtin_expect(any(large), 0)) {
    float a[VL], b[VL];
    store(a, x);
    store(b, y);
    large_angles(a, b, quarter);
    y = load(b);
  }
  return y;
}
AIOS_INLINE vf sin(vf x) { return sin_quarter(x, 0); }
AIOS_INLINE vf cos(vf x) { return sin_quarter(x, 1); }
AIOS_SCALAR(sin)
AIOS_SCALAR(cos)

// ---- error function: |x| <= 1 by x + x E(x^2), beyond by 1 - exp(-Q(|x|)) ----------------------
AIOS_INLINE vf erf(vf x) {
  vf a = min(absolute(x), splat(4.0f)), z = a * a;  // erf(4) rounds to 1
  vf e = splat(-0x1.445f48p-17f);              // [0, 1]: 5e-8
  e = fma(e, z, splat(0x1.d88750p-14f));
  e = fma(e, z, splat(-0x1.bccf66p-11f));
  e = fma(e, z, splat(0x1.562a60p-8f));
  e = fma(e, z, splat(-0x1.b829c8p-6f));
  e = fma(e, z, splat(0x1.ce2f08p-4f));
  e = fma(e, z, splat(-0x1.812746p-2f));
  e = fma(e, z, splat(0x1.06eba8p-3f));
  vf q = splat(-0x1.b77830p-20f);  // -log(erfc(a)) on [1, 4]: 2e-9
  q = fma(q, a, splat(0x1.825ce4p-15f));
  q = fma(q, a, splat(-0x1.38e5e6p-11f));
  q = fma(q, a, splat(0x1.37ecc6p-8f));
  q = fma(q, a, splat(-0x1.b0e246p-6f));
  q = fma(q, a, splat(0x1.c2e356p-4f));
  q = fma(q, a, splat(0x1.437eb4p-1f));
  q = fma(q, a, splat(0x1.2156fap0f));
  q = fma(q, a, splat(-0x1.4fb068p-12f));
  return copysign(a < 1.0f ? fma(e, a, a) : 1.0f - exp(-q), x);
}
AIOS_SCALAR(erf)

// ---- activations -------------------------------------------------------------------------------
AIOS_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
AIOS_INLINE vf relu(vf x) { return max(x, vf{}); }
AIOS_INLINE vf gelu(vf x) { return 0.5f * x * (1.0f + erf(x * 0x1.6a09e6p-1f)); }
AIOS_INLINE vf gelu_tanh(vf x) {
  vf inner = 0x1.988454p-1f * fma(x * x * x, splat(0.044715f), x);
  return 0.5f * x * (1.0f + tanh(inner));
}
AIOS_SCALAR(silu)
AIOS_SCALAR(relu)
AIOS_SCALAR(gelu)
AIOS_SCALAR(gelu_tanh)

// ---- powers, quotients and the rest ------------------------------------------------------------
// Two arguments, lane by lane.
#define AIOS_RARE2(f, expression)                                        \
  AIOS_NOINLINE float f(float p, float q) {                              \
    double x = p, y = q;                                                 \
    return (float)(expression);                                          \
  }                                                                      \
  AIOS_NOINLINE void f##_lanes(float* a, const float* b) {               \
    for (int i = 0; i < VL; ++i) a[i] = f(a[i], b[i]);                   \
  }                                                                      \
  AIOS_INLINE vf f(vf x, vf y) {                                         \
    float a[VL], b[VL];                                                  \
    store(a, x);                                                         \
    store(b, y);                                                         \
    f##_lanes(a, b);                                                     \
    return load(a);                                                      \
  }
AIOS_NOINLINE double python_remainder(double x, double y) {
  double r = __builtin_fmod(x, y);
  return r != 0.0 && (r < 0.0) != (y < 0.0) ? r + y : r;
}
// torch's steps, which tell what becomes of infinities and of a zero's sign; in double precision.
AIOS_NOINLINE double python_floor_divide(double x, double y) {
  const double r = __builtin_fmod(x, y), ratio = x / y;
  if (y == 0.0) return ratio;
  double whole = (x - r) / y;
  if (r != 0.0 && (r < 0.0) != (y < 0.0)) whole -= 1.0;
  return whole == 0.0 ? __builtin_copysign(0.0, ratio) : __builtin_rint(whole);
}
AIOS_RARE2(pow, __builtin_pow(x, y))
AIOS_RARE2(atan2, __builtin_atan2(x, y))
AIOS_RARE2(fmod, __builtin_fmod(x, y))
AIOS_RARE2(remainder, python_remainder(x, y))
AIOS_RARE2(floor_divide, python_floor_divide(x, y))
AIOS_INLINE vf trunc_divide(vf x, vf y) { return trunc(x / y); }
AIOS_NOINLINE float trunc_divide(float x, float y) { return trunc(x / y); }
AIOS_RARE(tan, __builtin_tan(x))
AIOS_RARE(asin, __builtin_asin(x))
AIOS_RARE(acos, __builtin_acos(x))
AIOS_RARE(atan, __builtin_atan(x))
AIOS_RARE(sinh, __builtin_sinh(x))
AIOS_RARE(cosh, __builtin_cosh(x))

// Whole numbers: a zero divisor gives 0 instead of a trap, and -1 is no trap either.
template <class X> AIOS_INLINE X whole_divide(X x, X y) {
  return y == 0 ? 0 : y == -1 ? -x : x / y;
}
template <class X> AIOS_INLINE X whole_remainder(X x, X y) {
  return y == 0 || y == -1 ? 0 : x % y;
}
template <class X> AIOS_INLINE X whole_floor_divide(X x, X y) {
  X r = whole_remainder(x, y);
  return whole_divide(x, y) - (X)(r != 0 && (r < 0) != (y < 0));
}
template <class X> AIOS_INLINE X whole_python_remainder(X x, X y) {
  X r = whole_remainder(x, y);
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}
template <class X> AIOS_INLINE X whole_pow(X x, X y) {
  if (y < 0) return x == 1 ? 1 : x == -1 ? (y % 2 ? -1 : 1) : 0;
  X r = 1;
  for (; y > 0; y >>= 1, x *= x)
    if (y & 1) r *= x;
  return r;
}
#define AIOS_WHOLE(f, general)                                                                \
  AIOS_INLINE int64_t f(int64_t x, int64_t y) { return general(x, y); }                       \
  AIOS_INLINE int32_t f(int32_t x, int32_t y) { return general(x, y); }                       \
  AIOS_INLINE vi f(vi x, vi y) {                                                              \
    vi r;                                                                                     \
    for (int i = 0; i < VL; ++i) r[i] = general((int32_t)x[i], (int32_t)y[i]);                \
    return r;                                                                                 \
  }
AIOS_WHOLE(trunc_divide, whole_divide)
AIOS_WHOLE(fmod, whole_remainder)
AIOS_WHOLE(floor_divide, whole_floor_divide)
AIOS_WHOLE(remainder, whole_python_remainder)
AIOS_WHOLE(pow, whole_pow)
AIOS_INLINE vi relu(vi x) { return x > 0 ? x : vi{}; }
AIOS_INLINE int32_t relu(int32_t x) { return x > 0 ? x : 0; }
AIOS_INLINE int64_t relu(int64_t x) { return x > 0 ? x : 0; }

