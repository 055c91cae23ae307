// Attention's two products with matrix tiles.
#pragma once
#include "attention_tiles.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr int kFetchNear = 3;        // the cache that a split is fetched to
constexpr bool kFetchLater = false;  // splits are fetched as they are prepared

// For 16 lanes: tiles 0 to 3 hold sums, 4 and 5 the first factor, 6 and 7 the second (except in held_scores). For fewer:
// 0 and 1 scores, 2 queries, 3 keys or values, 4 weights, 5 to 7 sums.
inline void configure_attention(int lanes) {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    config.rows[t] = (uint8_t)(t >= 4 ? lanes : kTile);
    config.row_bytes[t] = (uint16_t)(t >= 3 ? 64 : 4 * lanes);
  }
  LS_TILE_CONFIG(&config);
}

LS_INLINE void fetch_tile(const bf16* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) __builtin_prefetch(tile + 32 * i, 0, 3);
}

// scores [kKeys][16] of one tile of rows, or of two, with a block's keys. queries [chunk][pair of dimensions][row][2].
template <bool two>
inline void tile_scores(const KeyTile* keys, const bf16* queries, const bf16* queries2, long dim, float* scores,
                        float* scores2) {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  if (two) {
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
  }
  for (long c = 0; c < dim_chunks(dim); c++) {
    LS_TILE_LOAD(6, queries + c * 512, 64);
    LS_TILE_LOAD(4, keys[0].first + c * 32, keys[0].row_bytes);
    LS_TILE_BF16(0, 4, 6);
    LS_TILE_LOAD(5, keys[1].first + c * 32, keys[1].row_bytes);
    LS_TILE_BF16(1, 5, 6);
    if (two) {
      LS_TILE_LOAD(7, queries2 + c * 512, 64);
      LS_TILE_BF16(2, 4, 7);
      LS_TILE_BF16(3, 5, 7);
    }
  }
  LS_TILE_STORE(0, scores, 64);
  LS_TILE_STORE(1, scores + 256, 64);
  if (two) {
    LS_TILE_STORE(2, scores2, 64);
    LS_TILE_STORE(3, scores2 + 256, 64);
  }
}

// The same of two tiles of rows whose queries, of kHeldChunks chunks, stay in tiles 4 to 7 meanwhile.
constexpr long kHeldChunks = 2;

inline void hold_queries(const bf16* queries, const bf16* queries2) {
  LS_TILE_LOAD(4, queries, 64);
  LS_TILE_LOAD(5, queries + 512, 64);
  LS_TILE_LOAD(6, queries2, 64);
  LS_TILE_LOAD(7, queries2 + 512, 64);
}

inline void held_scores(const KeyTile* keys, float* scores, float* scores2) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    LS_TILE_ZERO(0);
    LS_TILE_LOAD(2, keys[half].first, keys[half].row_bytes);
    LS_TILE_BF16(0, 2, 4);
    LS_TILE_ZERO(1);
    LS_TILE_BF16(1, 2, 6);
    LS_TILE_LOAD(3, keys[half].first + 32, keys[half].row_bytes);
    LS_TILE_BF16(0, 3, 5);
    LS_TILE_BF16(1, 3, 7);
    LS_TILE_STORE(0, scores + half * 256, 64);
    LS_TILE_STORE(1, scores2 + half * 256, 64);
  }
}

// The same of few rows.
template <int L>
inline void few_scores(const KeyTile* keys, const bf16* queries, long dim, float* scores) {
  constexpr long kBytes = 4 * L;
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  for (long c = 0; c < dim_chunks(dim); c++) {
    LS_TILE_LOAD(2, queries + c * 32 * L, kBytes);
    LS_TILE_LOAD(3, keys[0].first + c * 32, keys[0].row_bytes);
    LS_TILE_BF16(0, 3, 2);
    LS_TILE_LOAD(3, keys[1].first + c * 32, keys[1].row_bytes);
    LS_TILE_BF16(1, 3, 2);
  }
  LS_TILE_STORE(0, scores, kBytes);
  LS_TILE_STORE(1, scores + 16 * L, kBytes);
}

// Before the blocks' scores: queries that stay in tiles are brought there.
template <bool two>
LS_INLINE void begin_scores(const TaskShape& t, const bf16* queries, const bf16* queries2) {
  if (two && t.chunks == kHeldChunks) hold_queries(queries, queries2);
}

// Scores [kKeys][L] of a block of keys with one tile of rows, or with two.
template <int L, bool two>
LS_INLINE void block_scores(const TaskShape& t, const KeyTile* keys, const bf16* queries, const bf16* queries2,
                            float* scores, float* scores2) {
  if constexpr (L < 16)
    few_scores<L>(keys, queries, t.dim, scores);
  else if (two && t.chunks == kHeldChunks)
    held_scores(keys, scores, scores2);
  else
    tile_scores<two>(keys, queries, queries2, t.dim, scores, scores2);
}

// Sums of few rows are made three tiles of dimensions at a time.
constexpr long kFewTiles = 3;

inline void begin_few_sums() {
  LS_TILE_ZERO(5);
  LS_TILE_ZERO(6);
  LS_TILE_ZERO(7);
}

inline void add_to_few_sums(const bf16* values, long left, const float* weights) {
  LS_TILE_LOAD(4, weights, 64);
  LS_TILE_LOAD(3, values, 64);
  LS_TILE_BF16(5, 4, 3);
  if (left > 1) {
    LS_TILE_LOAD(3, values + 512, 64);
    LS_TILE_BF16(6, 4, 3);
  }
  if (left > 2) {
    LS_TILE_LOAD(3, values + 1024, 64);
    LS_TILE_BF16(7, 4, 3);
  }
}

// To sums [row][padded].
inline void store_few_sums(long left, float* sum, long padded) {
  LS_TILE_STORE(5, sum, padded * 4);
  if (left > 1) LS_TILE_STORE(6, sum + 16, padded * 4);
  if (left > 2) LS_TILE_STORE(7, sum + 32, padded * 4);
}

// Sums of a tile of rows are made four tiles of dimensions at a time.
constexpr int kSumTiles = 4;

inline void begin_sums() {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  LS_TILE_ZERO(2);
  LS_TILE_ZERO(3);
}

// Sums += a block's values^T times its weights, tile `part` of `left` tiles of dimensions; 0 comes first.
LS_INLINE void add_to_sums(const bf16* values, long left, const float* weights, int part) {
  if (part == 0) {
    LS_TILE_LOAD(6, weights, 64);
    LS_TILE_LOAD(4, values, 64);
    LS_TILE_BF16(0, 4, 6);
  } else if (part == 1 && left > 1) {
    LS_TILE_LOAD(5, values + 512, 64);
    LS_TILE_BF16(1, 5, 6);
  } else if (part == 2 && left > 2) {
    LS_TILE_LOAD(4, values + 1024, 64);
    LS_TILE_BF16(2, 4, 6);
  } else if (part == 3 && left > 3) {
    LS_TILE_LOAD(5, values + 1536, 64);
    LS_TILE_BF16(3, 5, 6);
  }
}

// To sums [dimension][row].
inline void store_sums(long left, float* sum) {
  LS_TILE_STORE(0, sum, 64);
  if (left > 1) LS_TILE_STORE(1, sum + 256, 64);
  if (left > 2) LS_TILE_STORE(2, sum + 512, 64);
  if (left > 3) LS_TILE_STORE(3, sum + 768, 64);
}

// The sums of one tile of rows over blocks [begin, end). before(b, part, parts) makes the weights of block b, between
// the products of the block before: those take no more than the vectors' time.
template <int L, class Before>
LS_INLINE void sum_blocks(const TaskShape& t, const bf16* values, long begin, long end, const float* weights, float* sum,
                          const Before& before) {
  constexpr long kAtOnce = L < 16 ? kFewTiles : kSumTiles, kBlock = kKeys * L;
  for (long c = 0; c < t.columns; c += kAtOnce) {
    if constexpr (L == 16)
      begin_sums();
    else
      begin_few_sums();
    const long lag = c == 0;  // blocks between the weights' making and their use: stores take their time
    for (long next = begin; next < end + lag; next++) {
      const long b = next - lag;
      const bool makes = lag && next < end, adds = b >= begin;
      const bf16* from = values + (b * t.columns + c) * 512;
      if constexpr (L == 16) {
#pragma GCC unroll 4
        for (int part = 0; part < kSumTiles; part++) {
          if (adds) add_to_sums(from, t.columns - c, weights + b * kBlock, part);
          if (makes) {
            if (c + part < t.columns) fetch_tile(values + (next * t.columns + c + part) * 512);
            before(next, part, kSumTiles);
          }
        }
      } else {
        if (makes) before(next, 0, 1);
        if (adds) add_to_few_sums(from, t.columns - c, weights + b * kBlock);
      }
    }
    if constexpr (L == 16)
      store_sums(t.columns - c, sum + c * 256);
    else
      store_few_sums(t.columns - c, sum + c * 16, t.padded);
  }
}

}  // namespace
#endif
