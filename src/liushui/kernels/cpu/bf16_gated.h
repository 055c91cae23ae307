// SwiGLU's two products in one: silu(x gate^T) * (x up^T), from panels of both, straight into what the product after it
// multiplies with. The bits are those of product, activation and preparing one after the other.
#pragma once
#include "bf16.h"
#include "rows.h"

#if defined(LS_BF16)
namespace {

// A stacked weight [gate; up] whose halves are whole panels, and the weight after it.
inline bool gated_fits(const PackedWeight& gate_up, const PackedWeight& down) {
  return gate_up.format == liushui::kWeightBF16 && down.format == liushui::kWeightBF16 && !gate_up.next && !down.next &&
         gate_up.n == 2 * down.k && down.k % kPairColumns == 0;
}

// 32 columns of `height` rows; `to`: row 0's, `apart` elements to the next row of a tile, `over` to the next tile.
LS_INLINE void gate_rows(const float* gate, const float* up, const float* gate_bias, const float* up_bias, long height,
                         bf16* to, long apart, long over) {
  for (long r = 0; r < height; r++)
    for (long c = 0; c < kPairColumns; c += W) {
      vf g = load(gate + r * kPairColumns + c), u = load(up + r * kPairColumns + c);
      if (gate_bias) g = g + load(gate_bias + c), u = u + load(up_bias + c);
      store(to + r / kTile * over + r % kTile * apart + c, silu<bf16>(rounded<bf16>(g)) * rounded<bf16>(u));
    }
}

// The share of `worker`; inner: rows [rows, k of down] where `down` takes them as they are, else prepared for it.
inline void bf16_multiply_gated(const PackedWeight& gate_up, const PackedWeight& down, const void* x, long rows,
                                bf16* inner, int worker, int workers) {
  const TileInput input = {(const char*)x, bf16_direct(gate_up.k, liushui::kBFloat16, rows), rows, gate_up.k};
  const bool direct = bf16_direct(down.k, liushui::kBFloat16, rows);
  const long half = down.k, half_panels = half / kPairColumns, size = (kBlockPairs + 1) * kPairRows * kPairColumns;
  float* gates = (float*)liushui::scratch(liushui::kProduct, (size_t)size * sizeof(float));
  float* ups = gates + kBlockPairs * kPairRows * kPairColumns;
  tile_units(input, half_panels, worker, workers, [&](long panel, long begin, long end) {
    const long column = panel * kPairColumns;
    tile_panel(input, begin, end, bf16_panel(gate_up, panel), gates, kPairRows * kPairColumns,
               [](long, long, const float*) {});
    const float* bias = gate_up.bias ? gate_up.bias + column : nullptr;
    const auto finish = [&](long row, long height, const float* up) {
      bf16* to = direct ? inner + row * half + column : bf16_place(inner, half, row) + panel * (kPairBytes / 2);
      gate_rows(gates + (row - begin * kPairRows) * kPairColumns, up, bias, bias ? bias + half : nullptr, height, to,
                direct ? half : kInnerGroup, direct ? kTile * half : kTileBytes / 2);
    };
    tile_panel(input, begin, end, bf16_panel(gate_up, panel + half_panels), ups, 0, finish);
  });
}

}  // namespace
#endif
