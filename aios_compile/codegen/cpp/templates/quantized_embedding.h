// Rows of a quantised table, dequantised: one token an item.
//
// The text before this one defines K, ROWS (of the table), BITS, GROUP, LOW, SPAN, HEADER,
// GROUP_BYTES (of a row), JOINT, Scale, MINIMUMS, Minimum, SUPER_SCALE, SUPER_MINIMUM, ZERO_POINT,
// num_tokens(n), id_at(n, p, t), table(n, p) and out_row(n, p, t).
//
// A block is 16 rows: K / SPAN super-blocks of [HEADER][codes, scales, minimums of each group],
// every field of the 16 rows side by side, codes in units of four bytes. JOINT groups lie together:
// their codes, their scales, their minimums.

constexpr int BLOCK = 16;
constexpr int64_t CODE_BYTES = GROUP * BITS / 8;
constexpr int64_t SPAN_BYTES = HEADER + SPAN / GROUP * GROUP_BYTES;
constexpr int64_t BLOCK_BYTES = K / SPAN * SPAN_BYTES * BLOCK;
constexpr int COUNT = BITS == 8 ? 1 : BITS == 4 ? 2 : BITS == 5 ? 8 : 4;  // units that lie together
constexpr int UNITS = BITS == 8 ? 1 : COUNT / 2 + (BITS > 4);

AIOS_INLINE float scale_at(const float* p) { return *p; }
AIOS_INLINE float scale_at(const bf16* p) { return load1(p); }
AIOS_INLINE float scale_at(const f16* p) { return load1(p); }
AIOS_INLINE float scale_at(const int8_t* p) { return (float)*p; }
AIOS_INLINE float scale_at(const uint8_t* p) { return (float)*p; }

// The code of byte j of unit c of a lane.
AIOS_INLINE int code_at(const uint8_t* codes, int lane, int c, int j) {
  const auto byte = [&](int unit) { return (int)codes[(unit * BLOCK + lane) * 4 + j]; };
  if (BITS == 8) return byte(c);
  const int first = c / COUNT * UNITS, i = c % COUNT;
  const int low = i % 2 ? byte(first + i / 2) >> 4 : byte(first + i / 2) & 15;
  if (BITS == 4) return low;
  constexpr int WIDTH = BITS - 4;
  return low | (byte(first + UNITS - 1) >> (i * WIDTH) & ((1 << WIDTH) - 1)) << 4;
}

AIOS_INLINE int64_t quantized_embedding_items(const Sizes* n) { return num_tokens(n); }

AIOS_INLINE void quantized_embedding(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t id = *id_at(n, p, t), row = id < 0 ? 0 : id < ROWS ? id : ROWS - 1;
    const uint8_t* at = table(n, p) + row / BLOCK * BLOCK_BYTES;
    const int lane = (int)(row % BLOCK);
    float* out = out_row(n, p, t);
    for (int64_t s = 0; s < K / SPAN; ++s) {
      const f16* heads = (const f16*)at;
      const float over = SUPER_SCALE ? scale_at(heads + lane) : 1.0f;
      const float under = SUPER_MINIMUM ? scale_at(heads + SUPER_SCALE * BLOCK + lane) : 1.0f;
      at += HEADER * BLOCK;
      for (int g = 0; g < SPAN / GROUP; ++g) {
        const int64_t j = s % JOINT;  // JOINT > 1: a super-block is one group
        const uint8_t* codes = at + j * CODE_BYTES * BLOCK;
        const uint8_t* scales = at + (JOINT * CODE_BYTES + j * sizeof(Scale)) * BLOCK;
        const uint8_t* minimums =
            at + (JOINT * (CODE_BYTES + sizeof(Scale)) + j * sizeof(Minimum)) * BLOCK;
        float scale = scale_at((const Scale*)scales + lane), minimum = 0.0f;
        if (SUPER_SCALE) scale *= over;
        if (MINIMUMS) {
          minimum = scale_at((const Minimum*)minimums + lane);
          if (SUPER_MINIMUM) minimum *= under;
          if (ZERO_POINT) minimum *= scale;
        }
        for (int c = 0; c < GROUP / 4; ++c)
          for (int i = 0; i < 4; ++i) {
            const float value = (float)(code_at(codes, lane, c, i) + (int)LOW) * scale;
            *out++ = MINIMUMS ? value - minimum : value;
          }
        if (j == JOINT - 1) at += JOINT * GROUP_BYTES * BLOCK;
      }
    }
  }
}
