// Products of bfloat16 in vectors (VDPBF16PS), in the layouts of the tiles (bf16.h, attention_tiles.h): a row of a
// weight's tile, pairs of 16 columns, is a vector; a pair of x is broadcast. Every sum is one chain of that instruction
// over K, in order, whatever stands beside it, so one row and 512 give the same bits.
//
// On Zen 4, which begins one of these a cycle that each take six, 16 sums in registers reach 90 % of its peak.
#pragma once
#include "amx.h"

#if defined(LS_BF16_VECTORS)
#define LS_TILE_RELEASE()

namespace {

inline void configure_tiles(int, int, int) {}

// Rows of the first factor, and tiles of the second, [pair][column][2]: where they begin, how many bytes further on the
// next row or tile lies, the next pair of a tile, and the next 16 pairs of each.
struct PairRows {
  const char* at;
  long row, step;
};
struct PairTiles {
  const char* at;
  long tile, pair, step;
};
// Where the sums go, in floats.
struct PairSums {
  float* to;
  long row, tile;
};

LS_INLINE vf add_pairs(vf sum, vu x, vu w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }

// M rows times N tiles; `ahead`: that many bytes further on in the tiles is fetched to the second cache.
template <int M, int N, bool kFetch = false>
LS_INLINE void multiply_pairs(PairRows x, PairTiles w, long steps, const PairSums& y, long ahead = 0) {
  vf sum[M][N];
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[r][n] = vf{};
  for (; steps > 0; steps--, x.at += x.step, w.at += w.step) {
#pragma GCC unroll 4
    for (int p = 0; p < 16; p++) {
      vu columns[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const char* from = w.at + n * w.tile + p * w.pair;
        memcpy(&columns[n], from, 64);
        if (kFetch) __builtin_prefetch(from + ahead, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < M; r++) {
        uint32_t pair;
        memcpy(&pair, x.at + r * x.row + p * 4, 4);
        const vu both = pair + vu{};
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sum[r][n] = add_pairs(sum[r][n], both, columns[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(y.to + r * y.row + n * y.tile, sum[r][n]);
}

}  // namespace
#endif
