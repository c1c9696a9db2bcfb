// How the linears share out their work: tokens in tiles and chunks, columns in blocks of 16 rows.
//
// One token is one phase: each worker prepares it (rounds, quantises) when it takes items. More
// tokens are two: workers prepare parts of tiles in the kernel's workspace, then, behind a barrier,
// multiply. TILE is the tokens of a full register tile; a narrower tile computes on zeros in the
// lanes beyond its tokens. No choice here changes a bit of a result: each element is one chain of
// operations over k, whatever tile or item it falls in.
#pragma once
#include "prelude.h"

constexpr int BLOCK = 16;                            // rows of a packed block
constexpr int VECTORS = BLOCK / VL;                  // vectors of a packed block
constexpr int ITEM = 2;                              // blocks of a work item
constexpr int PART = 512;                            // values of a token that are prepared together

#ifndef AIOS_L2_BYTES
#define AIOS_L2_BYTES 524288                         // of a core
#endif

// What select_kernels may choose (codegen/cpp/candidates.py); no choice changes a bit of a result.
struct Standard {
  static constexpr bool FETCH = true;                // prefetch weights; else the hardware alone
  static constexpr int64_t AHEAD = 4096;             // bytes ahead in one stream of weights
  static constexpr int CACHE = 3;                    // into which: 3 the first, 2 L2
  static constexpr int64_t L2_BYTES = AIOS_L2_BYTES / 4 * 3;  // for tokens that are used again
};
struct Unfetched : Standard { static constexpr bool FETCH = false; };
struct IntoL2 : Standard {
  static constexpr int64_t AHEAD = 1024;             // 2 KiB: 4 bits 0.93x as fast
  static constexpr int CACHE = 2;
};
struct FarIntoL2 : IntoL2 { static constexpr int64_t AHEAD = 8192; };

// The candidate by which a tile of WIDTH tokens differs: one token is bound by memory; wider
// ones are Standard, and compiled once.
template <class A, class B, bool FIRST> struct Either { using Type = A; };
template <class A, class B> struct Either<A, B, false> { using Type = B; };
template <class C, int WIDTH> using Fetching = typename Either<C, Standard, WIDTH == 1>::Type;

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

// Call use(width) with the narrowest kernel's width for so many tokens, as a constant. Tiles of 8
// are bound by products: of 3 and 6 tokens by themselves they are 1.3x as fast (Zen 4, weights in
// the cache; in memory 1.0 to 1.3x), for half a second more of g++ a kernel.
template <int TILE, class Use> AIOS_INLINE void with_width(int64_t tokens, Use use) {
  if (tokens == 1) return use(Constant<1>());
  if constexpr (TILE > 2)
    if (tokens == 2) return use(Constant<2>());
  if constexpr (TILE == 8)
    if (tokens == 3) return use(Constant<3>());
  if constexpr (TILE > 4)
    if (tokens <= 4) return use(Constant<4>());
  if constexpr (TILE == 8)
    if (tokens <= 6) return use(Constant<6>());
  if constexpr (TILE > 8)
    if (tokens <= 8) return use(Constant<8>());
  use(Constant<TILE>());
}

// A linear on K values and COLUMNS columns. Tokens -> tiles of TILE -> chunks of tiles that fit in
// L2 together (TILE_BYTES each when prepared), as equal as can be: weights pass by once a chunk.
template <int64_t K, int64_t COLUMNS, int TILE, int64_t TILE_BYTES, class C = Standard>
struct Work {
  static constexpr int64_t NUM_BLOCKS = (COLUMNS + BLOCK - 1) / BLOCK;
  static constexpr int64_t ITEMS = (NUM_BLOCKS + ITEM - 1) / ITEM;
  static constexpr int64_t PARTS = (K + PART - 1) / PART;
  static constexpr int64_t CHUNK_TILES =
      C::L2_BYTES > TILE_BYTES ? C::L2_BYTES / TILE_BYTES : 1;
  int64_t tokens, tiles, chunks;
  explicit Work(int64_t t)
      : tokens(t), tiles((t + TILE - 1) / TILE), chunks((tiles + CHUNK_TILES - 1) / CHUNK_TILES) {}

  int64_t items() const { return tokens == 1 ? ITEMS : tokens * PARTS; }
  int64_t finish_items() const { return tokens == 1 ? 0 : chunks * ITEMS; }
  int64_t tokens_of(int64_t tile) const { return min(tokens - tile * TILE, (int64_t)TILE); }

  // Call use(count) where token t is the last one: so many tokens behind it fill up its tile.
  template <class Use> void behind_last(int64_t t, Use use) const {
    if (t + 1 == tokens)
      with_width<TILE>(tokens_of(t / TILE),
                       [&](auto width) { use(t / TILE * TILE + width.value - t - 1); });
  }

  // Call use(block, stop, tile, width) for each group of blocks and tile of the second phase.
  template <class Use> void for_panels(int64_t begin, int64_t end, Use use) const {
    while (begin < end) {
      const int64_t chunk = begin / ITEMS, block = begin % ITEMS * ITEM;
      const int64_t items = min(end - begin, ITEMS - begin % ITEMS);
      const int64_t stop = min(block + items * ITEM, NUM_BLOCKS);
      const int64_t tile0 = tiles * chunk / chunks, tile1 = tiles * (chunk + 1) / chunks;
      // A single tile passes over all its blocks; several share an item's blocks while in L2.
      const int64_t group = tile1 - tile0 == 1 ? stop - block : ITEM;
      for (int64_t b = block; b < stop; b += group)
        for (int64_t i = tile0; i < tile1; ++i)
          with_width<TILE>(tokens_of(i),
                           [&](auto width) { use(b, min(b + group, stop), i, width); });
      begin += items;
    }
  }
};
