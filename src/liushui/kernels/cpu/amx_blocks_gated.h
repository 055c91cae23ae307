// SwiGLU's two products in one, for expanded blocks (bf16_gated.h: for bfloat16). Sums are [column][row] or [row][column],
// and so the product after it takes its rows, where it is of the same kind: nothing has to be turned.
#pragma once
#include "amx_lone.h"

#if defined(LS_TILE_BF16)
namespace {

inline bool wide_gated_fits(const PackedWeight& gate_up, const PackedWeight& down) {
  return gate_up.format > liushui::kAsBFloat16 && down.format > liushui::kAsBFloat16 && !gate_up.next && !down.next &&
         gate_up.n == 2 * down.k && down.k % kWide == 0 && gate_up.k % kInnerGroup == 0;
}

// 16 columns of a tile of rows, [column][row], as pairs of columns.
inline void gate_columns(const float* gate, const float* up, const float* gate_bias, const float* up_bias, bf16* to) {
  vw order;
  for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i % 2 * 16 + i / 2);
  for (int c = 0; c < kTile; c += 2) {
    vf values[2];
    for (int i = 0; i < 2; i++) {
      vf g = load(gate + (c + i) * kTile), u = load(up + (c + i) * kTile);
      if (gate_bias) g = g + gate_bias[c + i], u = u + up_bias[c + i];
      values[i] = gated(g, u);
    }
    const vw pairs = looked_up(words_of(values[0], values[1]), order);
    memcpy((void*)(to + c * kTile), &pairs, 64);
  }
}

// 16 columns of `rows` rows, [row][column], as these rows' half of a chunk.
inline void gate_tile_rows(const float* gate, const float* up, const float* gate_bias, const float* up_bias, long rows,
                           bf16* to) {
  for (long r = 0; r < rows; r++)
    for (int c = 0; c < kTile; c += W) {
      vf g = load(gate + r * kTile + c), u = load(up + r * kTile + c);
      if (gate_bias) g = g + load(gate_bias + c), u = u + load(up_bias + c);
      store(to + r * kInnerGroup + c, gated(g, u));
    }
}

// The share of `worker`; inner: prepared for `down`. For a lone row: amx_lone.h.
inline void wide_multiply_gated(const PackedWeight& gate_up, const PackedWeight& down, const void* x, long rows,
                                bf16* inner, int worker, int workers) {
  const long half = down.k / kWide, chunks = half, tile = WideForms(gate_up).tile() * (long)sizeof(bf16);
  const bool by_rows = weight_second(plain_format(down.format));
  const bool turn = by_rows != weight_second(plain_format(gate_up.format));
  char* expanded = (char*)liushui::scratch(liushui::kProduct, kWideExpanded + 2 * kWideSums);
  uint32_t *gates = (uint32_t*)(expanded + kWideExpanded), *ups = gates + kWideSums / 4;
  wide_units(gate_up, half, rows, worker, workers, [&](long panel, long begin, long end) {
    const float* bias = gate_up.bias ? gate_up.bias + panel * kWide : nullptr;
    const float* up_bias = bias ? bias + down.k : nullptr;
    wide_panel({gate_up, (const char*)x, tile, begin, end, panel, expanded, gates}, [](long, long, uint32_t*) {});
    const WideTask of_up = {gate_up, (const char*)x, tile, begin, end, panel + half, expanded, ups};
    wide_panel(of_up, [&](long row, long height, uint32_t* sums) {
      for (int t = 0; t < (height > kTile ? 4 : 2); t++) {
        const uint32_t *up = sums + t * 256, *gate = gates + (up - ups);
        uint32_t turned[2][256];
        if (turn) {
          transpose_words(gate, 16, turned[0]), transpose_words(up, 16, turned[1]);
          gate = turned[0], up = turned[1];
        }
        const float *g = (const float*)gate, *u = (const float*)up, *add = bias ? bias + t % 2 * kTile : nullptr;
        const float* add_up = bias ? up_bias + t % 2 * kTile : nullptr;
        bf16* to = inner + ((row / kTile + t / 2) * chunks + panel) * 512 + t % 2 * (by_rows ? kTile : 256);
        if (by_rows)
          gate_tile_rows(g, u, add, add_up, min_of(kTile, height - t / 2 * kTile), to);
        else
          gate_columns(g, u, add, add_up, to);
      }
    });
  });
}

}  // namespace
#endif
