// Paged attention with an online softmax: AHEAD pages a step, SPAN pages a partial result, partial
// results merged in ascending order. Steps and spans begin at fixed places of the sequence, so that
// a row's bits do not depend on its batch, its chunk of the prompt, the tile that computes it, or
// on whether the spans of a row are computed side by side.
//
// The text before this one defines KeyValue (float, bf16, f16, int8_t or e4m3), IN_CODES (the last
// two: of each token and head there is a scale at key_scales_at and value_scales_at), Query and
// QUERIES, Share and SHARES (what a row's query and probabilities become for the products: one of
// attention_floats.h, attention_pairs.h and attention_codes.h, which follows this text), HEADS,
// KV_HEADS, D, DV, PAGE, SCALE, SOFTCAP (0: none), WINDOW and CHUNK (0: none), HAS_SINKS, HAS_ALIBI
// and SLOPES of the query heads (added: slope * (key - query)), AHEAD and SPAN (pages), MAX_SPANS
// (1: never side by side), SPLIT_TOKENS, num_tokens(n), num_sequences(n), part_at(n, p, t, h, span)
// (a row of DV + 2 floats) and the addresses q_at, k_at, v_at, out_at, pages_of, start_of,
// length_of, sink_at.

constexpr int GROUP = HEADS / KV_HEADS;                 // query heads of one key/value head
constexpr int TOKENS = GROUP >= 32 ? 1 : 32 / GROUP;    // query tokens of a tile
constexpr int ROWS = TOKENS * GROUP;                    // row = token of the tile * GROUP + head
constexpr int PAGE_VECTORS = PAGE / VL;
constexpr int REGISTERS = VL == 8 ? 8 : 16;             // accumulators, leaving room for operands
constexpr int DV_VECTORS = (DV + VL - 1) / VL;
constexpr int WIDE = DV_VECTORS * VL;                   // row length of `out` in scratch
// finite: exp(LOWEST - LOWEST) is 1, not NaN
constexpr float LOWEST = -3.0e38f;

constexpr int64_t UNITS = 16;             // wanted of a split: enough for some threads
constexpr int64_t TOGETHER = 8;           // heads at most, for the stack's sake

struct Row {                              // a softmax-weighted sum of values, not yet normalised
  float sum, highest;
  alignas(64) float out[WIDE];
};

struct Tile {
  int rows;
  int64_t head;                           // its first query head
  int64_t context;                        // tokens of the sequence in the cache
  int64_t from[ROWS], to[ROWS];           // visible keys of each row, both ends included
  alignas(64) Query q[ROWS][QUERIES];
  alignas(64) float scores[ROWS][AHEAD * PAGE];  // then probabilities
  alignas(64) Share shares[ROWS][SHARES];
  float query_scales[ROWS], share_scales[ROWS];  // of codes
  int32_t query_sums[ROWS];
  alignas(64) float out[ROWS][WIDE];      // of the span so far, like the three that follow
  alignas(64) float sums[ROWS][VL];
  float highest[ROWS], rescale[ROWS];
};

// The pages of a step: [begin, end) of the AHEAD pages of a group, and the group that comes next.
struct Step {
  int begin, end;
  int64_t first_key;                      // of the group
  const KeyValue* keys[AHEAD];
  const KeyValue* values[AHEAD];
  const KeyValue* next_keys[AHEAD];       // of the group that follows, to be fetched
  const KeyValue* next_values[AHEAD];
  const float* key_scales[AHEAD];         // of int8 caches, a page each
  const float* value_scales[AHEAD];
};
