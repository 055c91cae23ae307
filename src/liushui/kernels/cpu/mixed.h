// y = x w^T for float32 rows and bfloat16 weights that lie in tiles (bf16.h), in float32: tiles would round x. Every
// element takes its K terms in order, as in gemm.h, so that the bits are those of all other instruction sets.
#pragma once
#include "bf16.h"

#if defined(LS_BF16)
namespace {

static_assert(W == kTile, "a row of a tile is one vector of pairs");

constexpr int kMixedRows = 8;

// M rows times a panel of 32 columns.
template <int M>
void mixed_tile(const float* x, long k, const char* panel, float* y) {
  vf sum[M][2];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) sum[r][0] = sum[r][1] = vf{};
  for (long i = 0; i < k; i += 2) {
    const char* pairs = panel + i / kInnerGroup * kPairBytes + i % kInnerGroup / 2 * kWeightRow;
    __builtin_prefetch(pairs + 2 * kPairBytes, 0, 3);
    __builtin_prefetch(pairs + 2 * kPairBytes + kWeightTile, 0, 3);
    vu both[2];
    memcpy(&both[0], pairs, 64), memcpy(&both[1], pairs + kWeightTile, 64);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      if (i + odd == k) break;
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++) {
        const vf w = (vf)(odd ? both[p] & 0xffff0000u : both[p] << 16);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) sum[r][p] = fma(splat(x[r * k + i + odd]), w, sum[r][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) store(y + r * kPairColumns, sum[r][0]), store(y + r * kPairColumns + W, sum[r][1]);
}

using MixedTile = void (*)(const float*, long, const char*, float*);

template <int M>
MixedTile mixed_tile_of(long rows) {
  if constexpr (M == 0)
    return nullptr;
  else
    return rows < M ? mixed_tile_of<M - 1>(rows) : mixed_tile<M>;
}

inline void mixed_multiply(const PackedWeight& w, const float* x, long rows, long first_column, const Output& out,
                           int worker, int workers) {
  const long bytes = bf16_chunks(w.k) * kPairBytes;
  const Share share = share_of(bf16_panels(w.n), worker, workers);
  float y[kMixedRows * kPairColumns];
  for (long panel = share.begin; panel < share.end; panel++) {
    const long column = panel * kPairColumns, count = min_of(kPairColumns, w.n - column);
    for (long row = 0; row < rows; row += kMixedRows) {
      const long height = min_of(kMixedRows, rows - row);
      mixed_tile_of<kMixedRows>(height)(x + row * w.k, w.k, (const char*)w.data + panel * bytes, y);
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, y,
                kPairColumns);
    }
  }
}

}  // namespace
#endif
