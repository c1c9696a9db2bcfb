// Keys and values as float vectors: widened from bf16, f16 and int8 codes, fetched ahead.
//
// The text before this one defines KeyValue (float, bf16, f16 or int8_t).

template <class X> AIOS_INLINE vf widened(const X* x) { return load(x); }
template <class X> AIOS_INLINE vf widened(const X* x, int64_t count) { return load(x, count); }
AIOS_INLINE vf widened(const int8_t* x) {
#if AIOS_AVX512
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif AIOS_AVX2
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
  typedef int8_t Codes __attribute__((vector_size(VL)));
  return __builtin_convertvector(load_as<Codes>(x), vf);
#endif
}
AIOS_INLINE vf widened(const int8_t* x, int64_t count) {
  int8_t codes[VL] = {};
  memcpy(codes, x, count);
  return widened(codes);
}

template <class X> constexpr bool is_bf16(const X*) { return false; }
constexpr bool is_bf16(const bf16*) { return true; }

// bf16 in pairs: a vector's worth of 32-bit words holds twice as many values, the even ones in the
// lower halves and the odd ones in the upper. A shift and a mask make float vectors of them, where
// widening takes a shuffle and a shift each. Lanes are put in order when sums are stored.
constexpr bool IN_PAIRS = is_bf16((const KeyValue*)nullptr);
AIOS_INLINE vf even_values(vu pairs) { return (vf)(pairs << 16); }
AIOS_INLINE vf odd_values(vu pairs) { return (vf)(pairs & 0xffff0000u); }

// Values of a page's row, or of one row of two pages that are half a vector each.
AIOS_INLINE vu pairs_at(const void* row) { return load_as<vu>(row); }
AIOS_INLINE vu pairs_of(const void* first, const void* second) {
#if AIOS_AVX512
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first));
  return (vu)_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)second), 1);
#else
  vu pairs;
  memcpy(&pairs, first, sizeof(vu) / 2);
  memcpy((char*)&pairs + sizeof(vu) / 2, second, sizeof(vu) / 2);
  return pairs;
#endif
}

// Lanes of (even, odd) in order: even[0], odd[0], even[1] and so on, as two vectors.
AIOS_INLINE void interleave(vf& even, vf& odd) {
#if AIOS_AVX512
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps((__m512)even, low, (__m512)odd);
  odd = (vf)_mm512_permutex2var_ps((__m512)even, high, (__m512)odd);
  even = (vf)first;
#else
  vf first, second;
  for (int i = 0; i < VL / 2; ++i) {
    first[2 * i] = even[i], first[2 * i + 1] = odd[i];
    second[2 * i] = even[VL / 2 + i], second[2 * i + 1] = odd[VL / 2 + i];
  }
  even = first, odd = second;
#endif
}

// Bytes [at, at + SIZE) of the next step's page into L2. A page of a head is a few KiB somewhere:
// the hardware's prefetch begins anew at each. Reading blocks of 4 KiB in random order: 9 GB/s a
// core without, 19 GB/s with a prefetch of 8 KiB ahead or more; in sequence 29 GB/s (Zen 4).
template <int SIZE>
AIOS_INLINE void prefetch(const KeyValue* page, int64_t at) {
#pragma GCC unroll 16
  for (int line = 0; line < SIZE; line += 64)
    __builtin_prefetch((const char*)(page + at) + line, 0, 2);
}

AIOS_INLINE float highest_lane(vf x) {
#if AIOS_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  float highest = x[0];
  for (int i = 1; i < VL; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
#endif
}
