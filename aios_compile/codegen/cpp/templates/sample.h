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
  for (int64_t i = 0; i < V; i += VL)
      bad |= (bits_of(lanes_or(x, i, 0.0f)) & 0x7f800000) == 0x7f800000;
  if (any(bad)) return {0.0f, 0.0f, false};
  const float highest = highest_of(x);
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
AIOS_INLINE int64_t rank_of(const float* x, int64_t id) {
  vi before = splat(0);
  for (int64_t i = 0; i < V; i += VL) {
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

AIOS_NOINLINE uint64_t total_mass(const float* s) {
  uint64_t total = 0;
  for (int64_t i = 0; i < V; i += VL) {
    float mass[VL];
    store(mass, exp(lanes_or(s, i, -kInfinity)) * MASS_ONE);
    for (int j = 0; j < VL; ++j) total += (uint64_t)mass[j];
  }
  return total;
}

// Keep the shortest prefix of the descending order whose weight (tokens, or their mass) reaches
// `target`; tokens below `cut` are known not to be in it. A radix selection over the bits of the
// keys: no sorting, and exact because the weights are integers.
template <bool MASS>
AIOS_NOINLINE void keep_prefix(float* s, double target, float cut) {
  const int shifts[3] = {20, 10, 0}, widths[3] = {11, 10, 10};
  uint64_t before = 0;
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = shifts[level], width = widths[level];
    uint64_t weights[2048] = {};
    for (int64_t i = 0; i < V; i += VL) {
      if (!any(lanes_or(s, i, -kInfinity) >= cut)) continue;
      for (int64_t j = i; j < V && j < i + VL; ++j) {
        const uint32_t key = key_of(s[j]);
        if (s[j] >= cut && key >> (shift + width) == prefix)
          weights[(key >> shift) & ((1u << width) - 1)] += MASS ? mass_of(s[j]) : 1;
      }
    }
    uint32_t bucket = 0;
    while ((double)(before + weights[bucket]) < target) {
      before += weights[bucket];
      if (++bucket == 1u << width) return;  // all of it is needed
    }
    prefix = prefix << width | bucket;
  }
  for (int64_t i = 0; i < V; ++i) {
    const uint32_t key = key_of(s[i]);
    if (key < prefix) continue;
    if (key == prefix && (double)before < target) before += MASS ? mass_of(s[i]) : 1;
    else s[i] = -kInfinity;
  }
}

AIOS_INLINE void keep_likely(const Sizes* n, void* const* p, int64_t r, float* s) {
  const float least = *min_p_at(n, p, r), share = *top_p_at(n, p, r);
  const int64_t k = *top_k_at(n, p, r);
  int64_t kept = 0;
  for (int64_t i = 0; i < V; i += VL) {
    const vf x = lanes_or(s, i, -kInfinity);
    const vi stays = (x > -kInfinity) & ~(exp(x) < least);
    const vf y = select(stays, x, splat(-kInfinity));
    if (i + VL <= V) store(s + i, y);
    else store(s + i, y, V - i);
    for (int j = 0; j < VL; ++j) kept -= stays[j];
  }
  if (k > 0 && k < kept) keep_prefix<false>(s, (double)k, -HIGHEST);
  if (share < 1.0f) {
    const double total = (double)total_mass(s);
    // Tokens lighter than half of (1 - share) / V of the total cannot hold (1 - share) together.
    const double light = 0.5 * (1.0 - (double)share) * total / (double)V / (double)MASS_ONE;
    const float cut = light > 1e-30 ? log((float)light) - 1.0f : -HIGHEST;
    keep_prefix<true>(s, max((double)share * total, 1.0), cut < 0.0f ? cut : -1.0f);
  }
}

// ---- the draw ----------------------------------------------------------------------------------

// Word 0 of Philox4x32-10 for the counters (first + lane, position, 0, 0).
AIOS_INLINE vu philox(uint32_t first, uint32_t position, uint64_t seed) {
  uint32_t c0[VL], c1[VL], c2[VL], c3[VL], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < VL; ++i) {
    c0[i] = first + (uint32_t)i;
    c1[i] = position;
    c2[i] = c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < VL; ++i) {
      const uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
      c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = (uint32_t)p1;
      c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = (uint32_t)p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return load_as<vu>(c0);
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
  *ranks_at(n, p, r) = rank_of(x, id);
}

AIOS_INLINE int64_t sample_items(const Sizes* n) { return num_rows(n); }

AIOS_INLINE void sample(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) sample_row(n, p, r);
}
