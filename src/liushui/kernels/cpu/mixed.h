// y = x w^T for float32 rows and bfloat16 weights that lie in tiles (amx_bf16.h), in float32: tiles would round x. Every
// element takes its K terms in order, as in gemm.h, so that the bits are those of all other instruction sets.
#pragma once
#include "amx_bf16.h"

#if defined(LS_TILE_BF16)
namespace {

static_assert(W == kColumns, "a row of a tile is one vector of pairs");

constexpr int kMixedRows = 8;

// M rows times P panels of 16 columns; a panel's chunks lie `chunk_bytes` apart.
template <int M, int P>
void mixed_tile(const float* x, long k, const char* panel, long panel_bytes, long chunk_bytes, float* y) {
  vf sum[M][P];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) sum[r][p] = vf{};
  for (long i = 0; i < k; i += 2) {
    const char* pairs = panel + i / kInnerGroup * chunk_bytes + i % kInnerGroup * 32;
    vu both[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) {
      __builtin_prefetch(pairs + p * panel_bytes + 2048, 0, 3);
      memcpy(&both[p], pairs + p * panel_bytes, 64);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) sum[r][p] = fma(splat(x[r * k + i]), (vf)(both[p] << 16), sum[r][p]);
    if (i + 1 == k) break;
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) sum[r][p] = fma(splat(x[r * k + i + 1]), (vf)(both[p] & 0xffff0000u), sum[r][p]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) store(y + r * P * kColumns + p * kColumns, sum[r][p]);
}

using MixedTile = void (*)(const float*, long, const char*, long, long, float*);

template <int M>
MixedTile mixed_tile_of(int rows, int panels) {
  if constexpr (M == 0)
    return nullptr;
  else
    return rows < M ? mixed_tile_of<M - 1>(rows, panels) : panels == 2 ? mixed_tile<M, 2> : mixed_tile<M, 1>;
}

inline void mixed_multiply(const PackedWeight& w, const float* x, long rows, long first_column, const Output& out,
                           int worker, int workers) {
  const long panels = (w.n + kColumns - 1) / kColumns, bytes = bf16_chunks(w.k) * kTileBytes;
  const Share share = share_of((panels + 1) / 2, worker, workers);
  float y[kMixedRows * 2 * kColumns];
  for (long unit = share.begin; unit < share.end; unit++) {
    const long panel = 2 * unit, column = panel * kColumns, count = min_of(2 * kColumns, w.n - column);
    const int together = panel + 1 < panels ? 2 : 1;
    for (long row = 0; row < rows; row += kMixedRows) {
      const int height = (int)min_of(kMixedRows, rows - row);
      mixed_tile_of<kMixedRows>(height, together)(x + row * w.k, w.k, (const char*)w.data + panel * bytes, bytes,
                                                  kTileBytes, y);
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, y,
                together * kColumns);
    }
  }
}

}  // namespace
#endif
