// y = x w^T in float32, for weights in float32 or bfloat16 (widened in registers). The weight is packed once into
// panels of kPanel columns, [panel][k][column], so that a product reads it front to back.
//
// Every element of y is one accumulator that takes its K terms in order (put aside and taken up again between blocks
// of K, which changes nothing). How many rows or panels are computed together does not enter.
#pragma once
#include "product.h"

namespace {

constexpr int kPanel = 2 * W;
constexpr int kRows = LS_REGISTERS == 32 ? 10 : 6;  // rows of a register tile: kRows * 2 accumulators
constexpr long kRowBlock = 8 * kRows;               // rows that pass over a panel while it is in the cache
constexpr long kDepth = 768;                        // most terms taken at once, so that a panel's block fits there

// One register tile: M rows times P panels, terms [0, depth). A lone panel is accompanied by fetching `step`
// elements per term from `ahead` on.
template <class T, int M, int P>
void gemm_tile(long depth, const float* x, long ldx, const T* panel, long ldp, float* out, long ldo, bool first,
               const T* ahead, long step) {
  constexpr int N = 2 * P;
  vf sum[M][N];
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 16
    for (int c = 0; c < N; c++) sum[r][c] = first ? vf{} : load(out + r * ldo + c * W);
  for (long k = 0; k < depth; k++) {
    vf right[N];
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) {
      if (P == 1)
        for (int i = 0; i < kPanel; i += 64 / (int)sizeof(T)) __builtin_prefetch(ahead + k * step + i, 0, 2);
      right[2 * p] = load(panel + p * ldp + k * kPanel);
      right[2 * p + 1] = load(panel + p * ldp + k * kPanel + W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
      const vf left = splat(x[r * ldx + k]);
#pragma GCC unroll 16
      for (int c = 0; c < N; c++) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 16
    for (int c = 0; c < N; c++) store(out + r * ldo + c * W, sum[r][c]);
}

template <class T>
using GemmTile = void (*)(long, const float*, long, const T*, long, float*, long, bool, const T*, long);

template <class T, int M>
struct GemmTiles {
  static GemmTile<T> of(int rows) { return rows == M ? gemm_tile<T, M, 1> : GemmTiles<T, M - 1>::of(rows); }
};
template <class T>
struct GemmTiles<T, 0> {
  static GemmTile<T> of(int) { return nullptr; }
};

// `rows` rows of x [rows, in] times `panels` panels from `packed` on, into out.
template <class T>
void gemm_panels(const float* x, long rows, long in, const T* packed, int panels, float* out, long ldo) {
  const long tiles = (rows + kRows - 1) / kRows, stride = in * kPanel;
  const long blocks = max_of(1, (in + kDepth - 1) / kDepth), depth = (in + blocks - 1) / blocks;
  for (long k = 0; k < max_of(1, in); k += max_of(1, depth)) {
    const long terms = min_of(depth, in - k);
    const T* from = packed + k * kPanel;
    for (long tile = 0; tile < tiles; tile++) {  // tiles of nearly the same height
      const long begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
      const int height = (int)(end - begin);
      const GemmTile<T> kernel = panels == 4   ? gemm_tile<T, 1, 4>
                                 : panels == 2 ? (height == 1   ? gemm_tile<T, 1, 2>
                                                  : height == 2 ? gemm_tile<T, 2, 2>
                                                                : gemm_tile<T, 3, 2>)
                                               : GemmTiles<T, kRows>::of(height);
      // Together the tiles fetch the next block of the weight; a tile that is alone just looks a little ahead.
      const T* next = from + (k + depth < in ? depth * kPanel : stride - k * kPanel);
      const T* ahead = tiles > 1 ? next + terms * kPanel * tile / tiles : from + 16 * kPanel;
      kernel(terms, x + begin * in + k, in, from, stride, out + begin * ldo, ldo, k == 0, ahead,
             tiles > 1 ? kPanel / tiles : kPanel);
    }
  }
}

template <class T>
void gemm_multiply(const PackedWeight& w, const float* x, long rows, long first_column, const Output& out, int worker,
                   int workers) {
  const long panels = (w.n + kPanel - 1) / kPanel, row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int most = rows == 1 ? 4 : rows <= 3 ? 2 : 1;  // few rows: several panels, or the sums wait for themselves
  const Share share = share_of(panels * row_blocks, worker, workers);
  float* buffer = (float*)liushui::scratch(liushui::kProduct, kRowBlock * 4 * kPanel * sizeof(float));
  for (long unit = share.begin; unit < share.end;) {
    const long panel = unit / row_blocks, row = unit % row_blocks * kRowBlock, height = min_of(kRowBlock, rows - row);
    const long left = share.end - unit;  // of panels, where there is one row block
    const int together = row_blocks > 1 ? 1 : left >= most ? most : left >= 2 && most == 4 ? 2 : 1;
    gemm_panels(x + row * w.k, height, w.k, (const T*)w.data + panel * w.k * kPanel, together, buffer,
                together * kPanel);
    const long column = panel * kPanel, count = min_of(together * kPanel, w.n - column);
    emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, buffer,
              together * kPanel);
    unit += together;
  }
}

template <class T>
void gemm_pack_panel(const T* weight, long width, long in, long panel, T* packed) {
  T* to = packed + panel * in * kPanel;
  for (long c = 0; c < kPanel; c++) {
    const long row = panel * kPanel + c;
    for (long k = 0; k < in; k++) to[k * kPanel + c] = row < width ? weight[row * in + k] : T{};
  }
}

template <class T>
void gemm_embed(const PackedWeight& w, long row, float* out) {
  const T* from = (const T*)w.data + row / kPanel * w.k * kPanel + row % kPanel;
  for (long k = 0; k < w.k; k++) out[k] = widen(from[k * kPanel]);
}

}  // namespace
