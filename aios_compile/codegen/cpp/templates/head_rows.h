// Work on one head of one token at a time: norm, rotation, then to the output or to the caches.
//
// The text before this one defines D, V_WIDTH, ROTATED (0: no rotation), INTERLEAVED, PAGE,
// Q_HEADS and KV_HEADS (0: absent), num_tokens(n), the addresses, and for each of q and k
// NORM, EPS and weight; put(n, p, page, h, offset, keys, values) stores both in the caches.
// Item = (token, head): query heads first, then key/value heads.

constexpr int64_t ITEM_HEADS = Q_HEADS + KV_HEADS;

// out = x * rsqrt(mean(x^2) + eps) * weight; lanes are added in one fixed tree.
template <class Weight>
AIOS_INLINE void norm(const float* x, const Weight* weight, float eps, float* out) {
  vf sum = splat(0.0f);
  int64_t i = 0;
  for (; i + VL <= D; i += VL) sum = fma(load(x + i), load(x + i), sum);
  if (i < D) sum = fma(load(x + i, D - i), load(x + i, D - i), sum);
  const float factor = rsqrt(reduce_add(sum) / (float)D + eps);
  for_lanes(0, D, [&](int64_t d, auto count) {
    const vf value = load(x + d, count) * factor;
    store(out + d, weight ? value * load(weight + d, count) : value, count);
  });
}

// out = x * cos + rotate(x) * sin on the first ROTATED elements; the others pass. Where halves are
// whole vectors they are vectors; else the turned copy is not a detour: of the direct form in
// scalars GCC 12 makes fused multiply-add-subtracts even under -ffp-contract=off.
AIOS_INLINE void rotate(const float* x, const float* cosine, const float* sine, float* out) {
  constexpr int64_t HALF = ROTATED / 2;
  if constexpr (!INTERLEAVED && HALF % VL == 0) {
    for (int64_t i = 0; i < HALF; i += VL) {
      const vf low = load(x + i), high = load(x + i + HALF);
      store(out + i, low * load(cosine + i) + -high * load(sine + i));
      store(out + i + HALF, high * load(cosine + i + HALF) + low * load(sine + i + HALF));
    }
  } else {
    float turned[ROTATED + 1];
    if (INTERLEAVED) {
      for (int64_t i = 0; i < ROTATED; i += 2) {
        turned[i] = -x[i + 1];
        turned[i + 1] = x[i];
      }
    } else {
      for (int64_t i = 0; i < HALF; ++i) turned[i] = -x[i + HALF];
      for (int64_t i = HALF; i < ROTATED; ++i) turned[i] = x[i - HALF];
    }
    for (int64_t i = 0; i < ROTATED; ++i) out[i] = x[i] * cosine[i] + turned[i] * sine[i];
  }
  for (int64_t i = ROTATED; i < D; ++i) out[i] = x[i];
}

// The head after norm and rotation; either `x` itself or in one of the two buffers.
template <class Weight>
AIOS_INLINE const float* prepare(const Sizes* n, void* const* p, int64_t t, const float* x,
                                 bool has_norm, const Weight* weight, float eps,
                                 bool has_rotation, float (&buffer)[2][D]) {
  if (has_norm) {
    norm(x, weight, eps, buffer[0]);
    x = buffer[0];
  }
  if (!has_rotation) return x;
  rotate(x, cos_at(n, p, t), sin_at(n, p, t), buffer[1]);
  return buffer[1];
}

AIOS_INLINE void head_rows(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  alignas(64) float buffer[2][D];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / ITEM_HEADS, head = item % ITEM_HEADS;
    if (head < Q_HEADS) {
      const float* x = prepare(n, p, t, q_at(n, p, t, head), Q_NORM, q_weight(n, p), Q_EPS,
                               Q_ROTATION, buffer);
      memcpy(out_at(n, p, t, head), x, D * sizeof(float));
      continue;
    }
    const int64_t h = head - Q_HEADS, slot = *slot_at(n, p, t);
    const int64_t page = slot / PAGE, offset = slot % PAGE;
    const float* x = prepare(n, p, t, k_at(n, p, t, h), K_NORM, k_weight(n, p), K_EPS, K_ROTATION,
                             buffer);
    put(n, p, page, h, offset, x, value_at(n, p, t, h));
  }
}

AIOS_INLINE int64_t head_rows_items(const Sizes* n) { return num_tokens(n) * ITEM_HEADS; }
