// Products of attention by dot products of pairs of bf16 (add_product of products.h): queries and
// probabilities rounded to bf16, to nearest even, two of them a lane; keys and values as they are.
//
// D and PAGE are even, DV a multiple of VL. The order of a sum is that of the pairs, ascending.

constexpr int SUMS = 1;                  // accumulators of a row and a vector
constexpr int MOST_ROWS = VL == 8 ? 2 : 4;  // of add_values
template <int R> constexpr int COLUMNS = REGISTERS / R >= 8 && DV >= 8 * VL ? 8 : 4;  // vectors

AIOS_INLINE void take_query(Tile& tile, int r, const float* q) { elements_of(q, D, tile.q[r]); }

// Words of two rows side by side: lane i holds first[i], and second[i] above it.
AIOS_INLINE vu pair_rows(const bf16* first, const bf16* second) {
#if AIOS_AVX512
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first));
  const __m512i high = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)second));
  const vu order = (vu)lanes() * 0x10001u + (32u << 16);
  return (vu)_mm512_permutex2var_epi16(low, (__m512i)order, high);
#else
  const vu low = __builtin_convertvector(load_as<vh>(first), vu);
  return low | __builtin_convertvector(load_as<vh>(second), vu) << 16;
#endif
}

// Two vectors of them, of rows of 2 * VL values.
AIOS_INLINE void pair_rows(const bf16* first, const bf16* second, vu& left, vu& right) {
#if AIOS_AVX512
  const __m512i low = _mm512_loadu_si512(first), high = _mm512_loadu_si512(second);
  const vu order = (vu)lanes() * 0x10001u + (32u << 16);
  left = (vu)_mm512_permutex2var_epi16(low, (__m512i)order, high);
  right = (vu)_mm512_permutex2var_epi16(low, (__m512i)(order + (16u << 16 | 16u)), high);
#else
  left = pair_rows(first, second), right = pair_rows(first + VL, second + VL);
#endif
}

// Rows d and d + 1 of a page of keys, lanes from `at` on.
AIOS_INLINE vu pair_keys(const bf16* at) {
#if AIOS_AVX512
  if constexpr (PAGE == VL) {
    const vu order = (vu)lanes() * 0x10001u + (16u << 16);
    return (vu)_mm512_permutexvar_epi16((__m512i)order, _mm512_loadu_si512(at));
  }
#endif
  return pair_rows(at, at + PAGE);
}

// scores[row .. row + R)[page .. page + P) = q . k, over d ascending; the keys of a page are lanes.
template <int R, int P, bool FETCH>
AIOS_INLINE void dot(Tile& tile, int row, int page, const Step& step) {
  constexpr int N = P * PAGE_VECTORS;
  vf acc[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) acc[r][i] = splat(0.0f);
#pragma GCC unroll 2
  for (int64_t d = 0; d < D; d += 2) {
    if constexpr (FETCH)
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) prefetch<4 * PAGE>(step.next_keys[page + i], d * PAGE);
    vu key[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      key[i] = pair_keys(step.keys[page + i / PAGE_VECTORS] + d * PAGE + i % PAGE_VECTORS * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const pair value = tile.q[row + r][d / 2];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) acc[r][i] = add_product(key[i], value, acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(&tile.scores[row + r][page * PAGE + i * VL], acc[r][i]);
}

// Scores [begin, end) of a row -> shares: probabilities relative to `highest`, rounded. Returns
// sum + the rounded ones, so that what values are weighed with adds up to 1.
AIOS_INLINE vf weigh(Tile& tile, int r, int begin, int end, float highest, vf sum, const Step&) {
  for (int i = begin; i < end; i += VL) {
    const vf probability = exp_nonpositive(load(tile.scores[r] + i) - highest);
#if AIOS_AVX512 && defined(__AVX512BF16__)  // the same bits: no probability is a denormal
    const vh bits = (vh)_mm512_cvtneps_pbh((__m512)probability);
#else
    const vh bits = narrow_bf16(probability);
#endif
    store_as(&tile.shares[r][i], bits);
    sum += widen_bf16(bits);
  }
  return sum;
}

AIOS_INLINE void weigh_nothing(Tile& tile, int r, int begin, int end) {
  memset(&tile.shares[r][begin], 0, (end - begin) * sizeof(Share));
}

// out[row .. row + R)[V vectors] = out * rescale + shares . values, over pairs of keys ascending.
template <int R, int V, bool FULL, bool FETCH>
AIOS_INLINE void add_values(Tile& tile, int row, int64_t column, const Step& step) {
  vf acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      acc[r][v] = load(&tile.out[row + r][column + v * VL]) * tile.rescale[row + r];
  const auto add = [&](int64_t key, const vu(&value)[V]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      pair share;
      memcpy(&share, &tile.shares[row + r][key], sizeof(share));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = add_product(value[v], share, acc[r][v]);
    }
  };
  for (int page = step.begin; page < step.end; ++page) {
    const int64_t first = page * PAGE;
    const int64_t keys = min((int64_t)PAGE, tile.context - step.first_key - first);
    for (int64_t j = 0; j < keys; j += 2) {
      if constexpr (FETCH) {
        prefetch<V * VL * 2>(step.next_values[page], j * DV + column);
        prefetch<V * VL * 2>(step.next_values[page], (j + 1) * DV + column);
      }
      const KeyValue* at = step.values[page] + j * DV + column;
      vu value[V];
      if (j + 1 == keys) {               // alone: behind it anything may lie
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          value[v] = (vu)bits_of(widen_bf16(load_as<vh>(at + v * VL))) >> 16;
      } else {
        if constexpr (V == 1) value[0] = pair_rows(at, at + DV);
#pragma GCC unroll 16
        for (int v = 0; v + 2 <= V; v += 2)
          pair_rows(at + v * VL, at + DV + v * VL, value[v], value[v + 1]);
      }
      add(first + j, value);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(&tile.out[row + r][column + v * VL], acc[r][v]);
}

AIOS_INLINE void settle(Tile&) {}
