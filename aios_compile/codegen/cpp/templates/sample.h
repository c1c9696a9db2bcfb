// Sampling, one row of logits an item. See ir/sample_reference.py for the definition.
//
// The text before this one defines VOCABULARY, MAX_LOGPROBS, num_rows(n) and one address function
// for each input and output, called as the input with `_at` behind it.

constexpr int64_t V = VOCABULARY;
constexpr float MASS_ONE = 0x1p40f;      // masses are whole multiples of 2^-40: sums are exact
constexpr float MOST_NOISE = 22.9f;      // -log(2^-33) rounded up: the largest Gumbel value
constexpr float HIGHEST = 0x1.fffffep127f;

struct Raw { float highest, log_sum; bool finite; };

AIOS_INLINE vf lanes_or(const float* x, int64_t i, float other) {
  return i + VL <= V ? load(x + i) : keep(load(x + i, V - i), V - i, other);
}

AIOS_INLINE float highest_of(const float* x) {
  vf top = splat(-kInfinity);
  for (int64_t i = 0; i < V; i += VL) top = max(top, lanes_or(x, i, -kInfinity));
  return reduce_max(top);
}

// Highest logit, log of the sum of exponentials relative to it, and whether all are finite.
AIOS_NOINLINE Raw measure(const float* x) {
  vi bad = splat(0);
  vf top = splat(-kInfinity);
  for (int64_t i = 0; i < V; i += VL) {
    bad |= (bits_of(lanes_or(x, i, 0.0f)) & 0x7f800000) == 0x7f800000;
    top = max(top, lanes_or(x, i, -kInfinity));
  }
  if (any(bad)) return {0.0f, 0.0f, false};
  const float highest = reduce_max(top);
  vf sum = splat(0.0f);
  for (int64_t i = 0; i < V; i += VL) sum += exp(lanes_or(x, i, -kInfinity) - highest);
  return {highest, log(reduce_add(sum)), true};
}

AIOS_INLINE int64_t first_equal(const float* x, float value) {
  for (int64_t i = 0; i < V; i += VL)
    if (any(lanes_or(x, i, kNan) == value))
      for (int64_t j = i; j < V; ++j)
        if (x[j] == value) return j;
  return 0;
}

// Place of token `id` in the descending order, from 1: the lowest id first among equals.
AIOS_INLINE int64_t rank_of(const float* x, int64_t id, float highest) {
  const int64_t end = x[id] == highest ? id + 1 : V;  // before the highest are equals only
  vi before = splat(0);
  for (int64_t i = 0; i < end; i += VL) {
    const vf value = lanes_or(x, i, -kInfinity);
    before -= (value > x[id]) | ((value == x[id]) & (lanes() + (int32_t)i < (int32_t)id));
  }
  int64_t rank = 1;
  for (int i = 0; i < VL; ++i) rank += before[i];
  return rank;
}

AIOS_NOINLINE void top_tokens(const float* x, int64_t count, int64_t* ids, float* values) {
  int64_t filled = 0;
  float least = -kInfinity;  // of a full list: only what is above it enters
  for (int64_t i = 0; i < V; i += VL) {
    if (filled == count && !any(lanes_or(x, i, -kInfinity) > least)) continue;
    for (int64_t j = i; j < V && j < i + VL; ++j) {
      if (filled == count && !(x[j] > least)) continue;
      int64_t at = filled < count ? filled++ : count - 1;
      for (; at > 0 && values[at - 1] < x[j]; --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = x[j];
      ids[at] = j;
      least = values[count - 1];
    }
  }
}

AIOS_INLINE bool known(int64_t id) { return id >= 0 && id < V; }

// Copies the row to z with the allowed ids, biases and penalties applied.
AIOS_NOINLINE void process(const Sizes* n, void* const* p, int64_t r, const float* x, float* z) {
  const int64_t allowed = *allowed_starts_at(n, p, r), allowed_end = *allowed_starts_at(n, p,
      r + 1);
  if (allowed == allowed_end) {
    memcpy(z, x, V * sizeof(float));
  } else {
    for (int64_t i = 0; i < V; ++i) z[i] = -kInfinity;
    for (int64_t i = allowed; i < allowed_end; ++i) {
      const int64_t id = *allowed_ids_at(n, p, i);
      if (known(id)) z[id] = x[id];
    }
  }
  for (int64_t i = *bias_starts_at(n, p, r); i < *bias_starts_at(n, p, r + 1); ++i) {
    const int64_t id = *bias_ids_at(n, p, i);
    if (known(id)) z[id] += *bias_values_at(n, p, i);
  }
  const float repetition = *repetition_penalty_at(n, p, r), frequency = *frequency_penalty_at(n,
      p, r);
  const float presence = *presence_penalty_at(n, p, r);
  for (int64_t i = *penalty_starts_at(n, p, r); i < *penalty_starts_at(n, p, r + 1); ++i) {
    const int64_t id = *penalty_ids_at(n, p, i), count = *penalty_counts_at(n, p, i);
    if (!known(id)) continue;
    float value = z[id] > 0.0f ? z[id] / repetition : z[id] * repetition;
    if (count > 0) {
      value -= frequency * (float)count;
      value -= presence;
    }
    z[id] = value;
  }
}

// ---- what is kept: s <= 0 is (z - highest) / temperature; dropped tokens become -infinity ------

AIOS_INLINE uint32_t key_of(float s) {  // ascending keys are descending values
  uint32_t u;
  memcpy(&u, &s, 4);
  return u & 0x7fffffffu;
}
AIOS_INLINE uint64_t mass_of(float s) { return (uint64_t)(exp(s) * MASS_ONE); }

// The mass as high * 2^20 + low, both exact; sums of 1024 vectors fit in 31 bits.
AIOS_NOINLINE uint64_t total_mass(const float* s) {
  uint64_t total = 0;
  for (int64_t first = 0; first < V; first += 1024 * VL) {
    vi high = splat(0), low = splat(0);
    for (int64_t i = first; i < V && i < first + 1024 * VL; i += VL) {
      const vf mass = exp(lanes_or(s, i, -kInfinity)) * 0x1p20f;
      const vi whole = __builtin_convertvector(mass, vi);
      high += whole;
      low += __builtin_convertvector((mass - to_float(whole)) * 0x1p20f, vi);
    }
    for (int j = 0; j < VL; ++j) total += ((uint64_t)high[j] << 20) + (uint64_t)low[j];
  }
  return total;
}

// The key of the token at which the prefix of the descending order of s[count] reaches the weight
// `target` (tokens, or their mass), and the weight before that key; NO_KEY when all is needed.
// Values below `cut` are known to come later. A radix selection over the bits of the keys: no
// sorting, and exact because the weights are integers.
constexpr uint32_t NO_KEY = 0xffffffffu;
template <bool MASS>
AIOS_NOINLINE uint32_t select_key(const float* s, int64_t count, double target, float cut,
                                  uint64_t* before) {
  const int shifts[3] = {20, 10, 0}, widths[3] = {11, 10, 10};
  uint32_t prefix = 0;
  *before = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = shifts[level], width = widths[level];
    uint64_t weights[2048] = {};
    for (int64_t i = 0; i < count; i += VL) {
      if (i + VL <= count && !any(load(s + i) >= cut)) continue;
      for (int64_t j = i; j < count && j < i + VL; ++j) {
        const uint32_t key = key_of(s[j]);
        if (s[j] >= cut && key >> (shift + width) == prefix)
          weights[(key >> shift) & ((1u << width) - 1)] += MASS ? mass_of(s[j]) : 1;
      }
    }
    uint32_t bucket = 0;
    while ((double)(*before + weights[bucket]) < target) {
      *before += weights[bucket];
      if (++bucket == 1u << width) return NO_KEY;
    }
    prefix = prefix << width | bucket;
  }
  return prefix;
}

// Drop what comes after the shortest prefix of the descending order that reaches `target`.
template <bool MASS>
AIOS_INLINE void keep_prefix(float* s, double target, float cut) {
  uint64_t before;
  const uint32_t last = select_key<MASS>(s, V, target, cut, &before);
  if (last == NO_KEY) return;
  for (int64_t i = 0; i < V; i += VL) {
    const int64_t end = i + VL <= V ? i + VL : V;
    if (end == i + VL) {
      const vi key = bits_of(load(s + i)) & 0x7fffffff;
      if (!any(key == (int32_t)last)) {
        store(s + i, select(key < (int32_t)last, load(s + i), splat(-kInfinity)));
        continue;
      }
    }
    for (int64_t j = i; j < end; ++j) {
      const uint32_t key = key_of(s[j]);
      if (key < last) continue;
      if (key == last && (double)before < target) before += MASS ? mass_of(s[j]) : 1;
      else s[j] = -kInfinity;
    }
  }
}

// A value that at least k tokens reach: the k-th highest of the maxima of disjoint groups.
AIOS_INLINE float reached_by(const float* s, int64_t k) {
  constexpr int GROUPS = 1024 / VL;  // vectors of maxima
  if (k > 1024 || V < 4096) return -HIGHEST;
  vf tops[GROUPS];
  for (int g = 0; g < GROUPS; ++g) tops[g] = splat(-kInfinity);
  for (int64_t i = 0; i < V; i += GROUPS * VL)
    for (int g = 0; g < GROUPS && i + g * VL < V; ++g)
      tops[g] = max(tops[g], lanes_or(s, i + g * VL, -kInfinity));
  float values[1024];
  memcpy(values, tops, sizeof(values));
  uint64_t before;
  const uint32_t key = select_key<false>(values, 1024, (double)k, -HIGHEST, &before);
  float value;
  memcpy(&value, &key, 4);
  return key == NO_KEY ? -HIGHEST : -value;  // keys are magnitudes of values that are not positive
}

AIOS_INLINE void keep_likely(const Sizes* n, void* const* p, int64_t r, float* s) {
  const float least = *min_p_at(n, p, r), share = *top_p_at(n, p, r);
  const int64_t k = *top_k_at(n, p, r);
  if (least > 0.0f) {
    for (int64_t i = 0; i < V; i += VL) {
      const vf x = lanes_or(s, i, -kInfinity), y = select(exp(x) < least, splat(-kInfinity), x);
      if (i + VL <= V) store(s + i, y);
      else store(s + i, y, V - i);
    }
  }
  if (k > 0 && k < V) keep_prefix<false>(s, (double)k, reached_by(s, k));
  if (share < 1.0f) {
    const double total = (double)total_mass(s);
    // Tokens lighter than half of (1 - share) / V of the total cannot hold (1 - share) together.
    const double light = 0.5 * (1.0 - (double)share) * total / (double)V / (double)MASS_ONE;
    const float cut = light > 1e-30 ? log((float)light) - 1.0f : -HIGHEST;
    keep_prefix<true>(s, max((double)share * total, 1.0), cut < 0.0f ? cut : -1.0f);
  }
}

// ---- the draw ----------------------------------------------------------------------------------

typedef uint64_t vq __attribute__((vector_size(4 * VL)));

// The product of the even 32-bit lanes with m, in 64 bits.
AIOS_INLINE vq multiply_even(vu a, uint32_t m) {
#if AIOS_AVX512
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m));
#elif AIOS_AVX2
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m));
#else
  return ((vq)a & 0xffffffffu) * (uint64_t)m;
#endif
}
AIOS_INLINE void multiply(vu a, uint32_t m, vu* high, vu* low) {
  const vq even = multiply_even(a, m), odd = multiply_even((vu)((vq)a >> 32), m);
  *high = (vu)((even >> 32) | (odd & 0xffffffff00000000u));
  *low = (vu)((even & 0xffffffffu) | (odd << 32));
}

// Word 0 of Philox4x32-10 for the counters (first + lane, position, 0, 0).
AIOS_INLINE vu philox(uint32_t first, uint32_t position, uint64_t seed) {
  vu c0 = (vu)lanes() + first, c1 = vu{} + position, c2 = vu{}, c3 = vu{};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, &high0, &low0);
    multiply(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

AIOS_INLINE vf gumbel(uint32_t first, uint32_t position, uint64_t seed) {
  const vf word = __builtin_convertvector(philox(first, position, seed), vf);
  const vf u = min(word * 0x1p-32f + 0x1p-33f, splat(1.0f - 0x1p-24f));
  return -log(-log1p(-u));
}

AIOS_NOINLINE int64_t draw(const float* s, uint32_t position, uint64_t seed) {
  // Start from the likeliest token: most of the others then cannot win with any noise.
  const int64_t likeliest = first_equal(s, 0.0f);
  float best = s[likeliest] + gumbel((uint32_t)likeliest, position, seed)[0];
  int64_t chosen = likeliest;
  for (int64_t i = 0; i < V; i += VL) {
    const vf x = lanes_or(s, i, -kInfinity);
    if (!any(x + MOST_NOISE >= best)) continue;
    const vf noisy = x + gumbel((uint32_t)i, position, seed);
    if (!any(noisy >= best)) continue;
    for (int j = 0; j < VL; ++j)
      if (noisy[j] > best || (noisy[j] == best && i + j < chosen)) {
        best = noisy[j];
        chosen = i + j;
      }
  }
  return chosen;
}

AIOS_INLINE bool changes(const Sizes* n, void* const* p, int64_t r) {
  return *allowed_starts_at(n, p, r) != *allowed_starts_at(n, p, r + 1) ||
         *bias_starts_at(n, p, r) != *bias_starts_at(n, p, r + 1) ||
         *penalty_starts_at(n, p, r) != *penalty_starts_at(n, p, r + 1);
}

AIOS_NOINLINE int64_t choose(const Sizes* n, void* const* p, int64_t r, const float* x,
    float highest) {
  const float temperature = *temperature_at(n, p, r);
  const bool greedy = !(temperature > 0.0f);
  if (greedy && !changes(n, p, r)) return first_equal(x, highest);
  alignas(64) float z[V];
  process(n, p, r, x, z);
  for (int64_t i = 0; i < V; ++i) z[i] = z[i] > HIGHEST ? HIGHEST : z[i];
  const float top = highest_of(z);
  if (greedy || top == -kInfinity) return first_equal(z, top);
  for (int64_t i = 0; i < V; ++i) z[i] = (z[i] - top) / temperature;
  keep_likely(n, p, r, z);
  return draw(z, (uint32_t)*sample_positions_at(n, p, r), (uint64_t)*seeds_at(n, p, r));
}

AIOS_INLINE void sample_row(const Sizes* n, void* const* p, int64_t r) {
  const float* x = logits_at(n, p, r);
  int64_t* top_ids = top_ids_at(n, p, r);
  float* top_values = top_logprobs_at(n, p, r);
  for (int64_t i = 0; i < MAX_LOGPROBS; ++i) {
    top_ids[i] = 0;
    top_values[i] = -kInfinity;
  }
  *sampled_ids_at(n, p, r) = *ranks_at(n, p, r) = *finite_at(n, p, r) = 0;
  *logprobs_at(n, p, r) = 0.0f;
  const Raw raw = measure(x);
  if (!raw.finite) return;
  *finite_at(n, p, r) = 1;
  const int64_t count = min(min(*logprob_counts_at(n, p, r), (int64_t)MAX_LOGPROBS), V);
  if (count > 0) top_tokens(x, count, top_ids, top_values);
  for (int64_t i = 0; i < count; ++i) top_values[i] = top_values[i] - raw.highest - raw.log_sum;
  const int64_t given = *given_ids_at(n, p, r);
  const int64_t id = *has_given_at(n, p, r) ? min(max(given, (int64_t)0), V - 1) : choose(n, p, r,
      x, raw.highest);
  *sampled_ids_at(n, p, r) = id;
  *logprobs_at(n, p, r) = x[id] - raw.highest - raw.log_sum;
  *ranks_at(n, p, r) = rank_of(x, id, raw.highest);
}

AIOS_INLINE int64_t sample_items(const Sizes* n) { return num_rows(n); }

AIOS_INLINE void sample(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) sample_row(n, p, r);
}
