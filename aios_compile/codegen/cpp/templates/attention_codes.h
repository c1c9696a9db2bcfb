// Products of attention over int8 codes by dot products of bytes: a query becomes whole numbers of
// 16 bits under a scale of its own, the probabilities of a step (times the values' scales) whole
// numbers of 16 bits under the largest. Both are multiplied as two bytes, and sums are exact: the
// text for processors without such products gives the same bits.
//
// D is a multiple of 4, at most 512 (no sum reaches 2^31); DV a multiple of 4 vectors. Lanes of a
// value's product are settled when a span is done.

constexpr int SUMS = 2;                  // accumulators of a row and a vector: upper, lower bytes
constexpr int MOST_ROWS = 2;             // of add_values
template <int R> constexpr int COLUMNS = 4;  // vectors
constexpr int STEP_KEYS = AHEAD * PAGE;

#if AIOS_AVX512 && defined(__AVX512VNNI__)
#define AIOS_BYTES 1
#else
#define AIOS_BYTES 0
#endif

#if AIOS_BYTES
AIOS_INLINE vi four_at(const void* bytes) {
  int32_t four;
  memcpy(&four, bytes, 4);
  return splat(four);
}

AIOS_INLINE vi add_bytes(vi sum, vi unsigned_bytes, vi signed_bytes) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
}

// Four rows of 16 keys, a page apart -> lanes: the four bytes of a key, plus 128.
AIOS_INLINE vi four_rows(const int8_t* at) {
  const __m128i* rows[4] = {(const __m128i*)at, (const __m128i*)(at + PAGE),
                            (const __m128i*)(at + 2 * PAGE), (const __m128i*)(at + 3 * PAGE)};
  __m512i x;
  if constexpr (PAGE == VL) {
    x = _mm512_loadu_si512(at);
  } else {
    x = _mm512_castsi128_si512(_mm_loadu_si128(rows[0]));
    x = _mm512_inserti32x4(x, _mm_loadu_si128(rows[1]), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128(rows[2]), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128(rows[3]), 3);
  }
  const __m512i quads = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quads, x), bytes);
  return (vi)_mm512_xor_si512(x, _mm512_set1_epi8(-128));
}

// 64 columns of four rows of values -> four vectors whose lanes hold the four bytes of a column:
// run l of vector m (four lanes) is columns 16 l + 4 m and on.
AIOS_INLINE void four_columns(const int8_t* at, vi* out) {
  const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + DV);
  const __m512i c = _mm512_loadu_si512(at + 2 * DV), d = _mm512_loadu_si512(at + 3 * DV);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
  out[0] = (vi)_mm512_unpacklo_epi16(ab, cd), out[1] = (vi)_mm512_unpackhi_epi16(ab, cd);
  out[2] = (vi)_mm512_unpacklo_epi16(ab2, cd2), out[3] = (vi)_mm512_unpackhi_epi16(ab2, cd2);
}
#endif

// q -> [D] upper bytes, [D] lower ones (signed both): 256 * upper + lower, 0 where all are tiny.
AIOS_INLINE void take_query(Tile& tile, int r, const float* q) {
  vf top = vf{};
  vi lost = vi{};
  for_lanes(0, D, [&](int64_t d, auto count) { top = larger(absolute(load(q + d, count)), top); });
  const float most = highest_lane(top), inverse = most < 0x1p-100f ? 0.0f : 32512.0f / most;
  vi sum = vi{};
  for_lanes(0, D, [&](int64_t d, auto count) {
    const vf x = load(q + d, count);
    const vi whole = nearest(x * inverse), upper = (whole + 128) >> 8;
    sum += whole, lost |= !(absolute(x) < kInfinity);
    const vc bytes[2] = {__builtin_convertvector(upper, vc),
                         __builtin_convertvector(whole - (upper << 8), vc)};
    memcpy(&tile.q[r][d], &bytes[0], number_of(count));
    memcpy(&tile.q[r][D + d], &bytes[1], number_of(count));
  });
  int32_t total = 0;
  for (int l = 0; l < VL; ++l) total += sum[l];
  tile.query_sums[r] = total;
  tile.query_scales[r] = any(lost) ? kNan : most < 0x1p-100f ? 0.0f : most / 32512.0f;
}

// scores[row .. row + R)[page .. page + P) = q . k; the keys of a page are lanes.
template <int R, int P, bool FETCH>
AIOS_INLINE void dot(Tile& tile, int row, int page, const Step& step) {
  constexpr int N = P * PAGE_VECTORS;
  vi upper[R][N], lower[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) upper[r][i] = lower[r][i] = vi{};
  for (int64_t d = 0; d < D; d += 4) {
    if constexpr (FETCH)
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) prefetch<4 * PAGE>(step.next_keys[page + i], d * PAGE);
#if AIOS_BYTES
    vi key[N];                           // lane: d .. d + 3 of a key, plus 128
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      key[i] = four_rows(step.keys[page + i / PAGE_VECTORS] + d * PAGE + i % PAGE_VECTORS * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vi high = four_at(&tile.q[row + r][d]), low = four_at(&tile.q[row + r][D + d]);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        upper[r][i] = add_bytes(upper[r][i], key[i], high);
        lower[r][i] = add_bytes(lower[r][i], key[i], low);
      }
    }
#else
    for (int e = 0; e < 4; ++e)
      for (int i = 0; i < N; ++i) {
        const KeyValue* at = step.keys[page + i / PAGE_VECTORS] + i % PAGE_VECTORS * VL;
        const vi key = to_int(widened(at + (d + e) * PAGE)) + 128;
        for (int r = 0; r < R; ++r) {
          upper[r][i] += key * (int32_t)tile.q[row + r][d + e];
          lower[r][i] += key * (int32_t)tile.q[row + r][D + d + e];
        }
      }
#endif
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vi sum = (upper[r][i] << 8) + lower[r][i] - (tile.query_sums[row + r] << 7);
      store(&tile.scores[row + r][page * PAGE + i * VL],
            to_float(sum) * tile.query_scales[row + r]);
    }
}

// Scores [begin, end) of a row -> shares: probabilities relative to `highest` times the values'
// scales, [STEP_KEYS] upper bytes, then lower ones, of 65535 parts of the largest. Returns sum +
// the probabilities.
AIOS_INLINE vf weigh(Tile& tile, int r, int begin, int end, float highest, vf sum,
                     const Step& step) {
  float* s = tile.scores[r];
  vf top = vf{};
  vi lost = vi{};
  for (int i = begin; i < end; i += VL) {
    const vf probability = exp_nonpositive(load(s + i) - highest);
    sum += probability;
    const vf scale = load(step.value_scales[i / PAGE] + i % PAGE);
    const vf share = select(probability == 0.0f, vf{}, probability * scale);
    store(s + i, share);
    top = larger(share, top), lost |= !(share < kInfinity);
  }
  const float most = highest_lane(top), factor = most < 0x1p-100f ? 0.0f : 65535.0f / most;
  for (int i = begin; i < end; i += VL) {
    const vi whole = to_int(load(s + i) * factor + 0.5f);
    store_as(&tile.shares[r][i], __builtin_convertvector(whole >> 8, vb));
    store_as(&tile.shares[r][STEP_KEYS + i], __builtin_convertvector(whole & 255, vb));
  }
  tile.share_scales[r] = any(lost) ? kNan : most * (1.0f / 65535.0f);
  return sum;
}

AIOS_INLINE void weigh_nothing(Tile& tile, int r, int begin, int end) {
  memset(&tile.shares[r][begin], 0, end - begin);
  memset(&tile.shares[r][STEP_KEYS + begin], 0, end - begin);
  tile.share_scales[r] = 0.0f;
}

// upper, lower[R][V] += shares of the keys first .. first + 3 times their values at `at`.
template <int R, int V>
AIOS_INLINE void add_four(const Tile& tile, int row, int64_t first, const KeyValue* at,
                          vi (&upper)[R][V], vi (&lower)[R][V]) {
#if AIOS_BYTES
  static_assert(V % 4 == 0);
  vi value[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v += 4) four_columns(at + v * VL, value + v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const uint8_t* shares = tile.shares[row + r] + first;
    const vi high = four_at(shares), low = four_at(shares + STEP_KEYS);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      upper[r][v] = add_bytes(upper[r][v], high, value[v]);
      lower[r][v] = add_bytes(lower[r][v], low, value[v]);
    }
  }
#else
  for (int e = 0; e < 4; ++e)
    for (int v = 0; v < V; ++v) {
      const vi value = to_int(widened(at + e * DV + v * VL));
      for (int r = 0; r < R; ++r) {
        upper[r][v] += value * (int32_t)tile.shares[row + r][first + e];
        lower[r][v] += value * (int32_t)tile.shares[row + r][STEP_KEYS + first + e];
      }
    }
#endif
}

// out[row .. row + R)[V vectors] = out * rescale + scale * shares . values, the sum of a step's
// shares being a whole number. With dot products of bytes the columns of four vectors lie apart, as
// four_columns leaves them; `settle` mends that.
template <int R, int V, bool FULL, bool FETCH>
AIOS_INLINE void add_values(Tile& tile, int row, int64_t column, const Step& step) {
  vi upper[R][V], lower[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) upper[r][v] = lower[r][v] = vi{};
  for (int page = step.begin; page < step.end; ++page) {
    const int64_t first = page * PAGE;
    const int64_t keys = min((int64_t)PAGE, tile.context - step.first_key - first);
    for (int64_t j = 0; j < keys; j += 4) {  // behind the last key shares are 0
      if constexpr (FETCH)
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e)
          prefetch<V * VL>(step.next_values[page], (j + e) * DV + column);
      add_four<R, V>(tile, row, first + j, step.values[page] + j * DV + column, upper, lower);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      float* out = &tile.out[row + r][column + v * VL];
      const vf sum = to_float((upper[r][v] << 8) + lower[r][v]);
      store(out, fma(sum, splat(tile.share_scales[row + r]), load(out) * tile.rescale[row + r]));
    }
}

// Columns of `out` in order: runs of four floats, 4 x 4 of them transposed.
AIOS_INLINE void settle(Tile& tile) {
#if AIOS_BYTES
  for (int r = 0; r < tile.rows; ++r)
    for (int64_t column = 0; column < DV; column += 4 * VL) {
      float runs[4 * VL];
      memcpy(runs, &tile.out[r][column], sizeof(runs));
      for (int i = 0; i < VL; ++i)
        memcpy(&tile.out[r][column + 4 * (i % 4 * 4 + i / 4)], runs + 4 * i, 4 * sizeof(float));
    }
#else
  (void)tile;
#endif
}
