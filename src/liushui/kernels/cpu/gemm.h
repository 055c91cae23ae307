// y = x w^T + b in float32. The weight is packed once into panels of kPanel columns, [panel][k][column], so that a
// product reads it front to back.
//
// Every element of y is one accumulator that takes its K terms in order (put aside in y and taken up again between
// blocks of K, which changes nothing), then the bias. How many rows or panels are computed together does not enter.
#pragma once
#include "library.h"
#include "simd.h"

namespace {

constexpr int kPanel = 2 * W;
constexpr int kRows = LS_REGISTERS == 32 ? 10 : 6;  // rows of a register tile: kRows * 2 accumulators
constexpr long kRowBlock = 8 * kRows;               // rows that pass over a panel while it is in the cache
constexpr long kDepth = 768;                        // most terms taken at once, so that a panel's block fits there

struct Linear {
  const float *x, *packed, *bias;
  float* out;
  long rows, in, width;     // x [rows, in], out [rows, width]
  long row_blocks, panels;  // how many there are
  long group;               // panels per task
};

// One register tile: M rows times P panels, terms [0, depth). A lone panel is accompanied by fetching `step`
// floats per term from `ahead` on.
template <int M, int P>
void multiply(long depth, const float* x, long ldx, const float* panel, long ldp, float* out, long ldo, bool first,
              const float* bias, const float* ahead, long step) {
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
        for (int i = 0; i < kPanel; i += 16) __builtin_prefetch(ahead + k * step + i, 0, 2);
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
    for (int c = 0; c < N; c++) store(out + r * ldo + c * W, bias ? sum[r][c] + load(bias + c * W) : sum[r][c]);
}

using Multiply = void (*)(long, const float*, long, const float*, long, float*, long, bool, const float*, const float*,
                          long);

template <int M>
struct Kernels {
  static Multiply of(int rows) { return rows == M ? multiply<M, 1> : Kernels<M - 1>::of(rows); }
};
template <>
struct Kernels<0> {
  static Multiply of(int) { return nullptr; }
};

// Rows [row, row + rows) times `panels` panels from `panel` on, into `out` (whose row 0 is `row`).
void multiply_panels(const Linear& a, long row, long rows, long panel, int panels, float* out, long ldo,
                     const float* bias) {
  const long tiles = (rows + kRows - 1) / kRows, stride = a.in * kPanel;
  const long blocks = max_of(1, (a.in + kDepth - 1) / kDepth), depth = (a.in + blocks - 1) / max_of(1, blocks);
  for (long k = 0; k < max_of(1, a.in); k += max_of(1, depth)) {
    const long terms = min_of(depth, a.in - k);
    const float* from = a.packed + panel * stride + k * kPanel;
    const float* add = k + depth >= a.in ? bias : nullptr;
    for (long tile = 0; tile < tiles; tile++) {  // tiles of nearly the same height
      const long begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
      const float* x = a.x + (row + begin) * a.in + k;
      float* to = out + begin * ldo;
      const int height = (int)(end - begin);
      const Multiply kernel = panels == 4   ? multiply<1, 4>
                              : panels == 2 ? (height == 1   ? multiply<1, 2>
                                               : height == 2 ? multiply<2, 2>
                                                             : multiply<3, 2>)
                                            : Kernels<kRows>::of(height);
      // Together the tiles fetch the next block of the weight; a tile that is alone just looks a little ahead.
      const float* next = from + (k + depth < a.in ? depth * kPanel : stride - k * kPanel);
      const float* ahead = tiles > 1 ? next + terms * kPanel * tile / tiles : from + 16 * kPanel;
      kernel(terms, x, a.in, from, stride, to, ldo, k == 0, add, ahead, tiles > 1 ? kPanel / tiles : kPanel);
    }
  }
}

void linear_task(void* context, long task) {
  const Linear& a = *(const Linear*)context;
  const long row = task % a.row_blocks * kRowBlock, rows = min_of(kRowBlock, a.rows - row);
  const long last = min_of(a.panels, (task / a.row_blocks + 1) * a.group);
  const int most = rows == 1 ? 4 : rows <= 3 ? 2 : 1;  // few rows: several panels, or the sums wait for themselves
  for (long panel = task / a.row_blocks * a.group; panel < last;) {
    const long column = panel * kPanel;
    if (column + kPanel > a.width) {  // the last, narrower panel
      float* buffer = (float*)liushui::scratch(liushui::kWork, (kRowBlock + 1) * kPanel * sizeof(float));
      float* bias = buffer + kRowBlock * kPanel;
      const size_t bytes = (size_t)(a.width - column) * sizeof(float);
      if (a.bias) memcpy(bias, a.bias + column, bytes);
      multiply_panels(a, row, rows, panel, 1, buffer, kPanel, a.bias ? bias : nullptr);
      for (long r = 0; r < rows; r++) memcpy(a.out + (row + r) * a.width + column, buffer + r * kPanel, bytes);
      return;
    }
    const long whole = min_of(last, a.width / kPanel) - panel;
    const int panels = whole >= most ? most : whole >= 2 && most == 4 ? 2 : 1;
    multiply_panels(a, row, rows, panel, panels, a.out + row * a.width + column, a.width,
                    a.bias ? a.bias + column : nullptr);
    panel += panels;
  }
}

void run_linear(int threads, Linear a) {
  a.panels = (a.width + kPanel - 1) / kPanel;
  a.row_blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  // About eight tasks per thread; up to 8 panels share a reading of the rows.
  a.group = min_of(8, max_of(a.rows <= 3 ? 4 : 1, a.panels * a.row_blocks / (8 * max_of(1, threads))));
  const long tasks = (a.panels + a.group - 1) / a.group * a.row_blocks;
  liushui::parallel(a.rows * a.in * a.width < 65536 ? 1 : threads, tasks, linear_task, &a);
}

struct Pack {
  const float* weight;
  float* packed;
  long width, in;
};

void pack_task(void* context, long panel) {
  const Pack& a = *(const Pack*)context;
  float* to = a.packed + panel * a.in * kPanel;
  for (long c = 0; c < kPanel; c++) {
    const long row = panel * kPanel + c;
    for (long k = 0; k < a.in; k++) to[k * kPanel + c] = row < a.width ? a.weight[row * a.in + k] : 0.0f;
  }
}

}  // namespace
