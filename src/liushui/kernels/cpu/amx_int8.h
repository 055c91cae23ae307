// The integer products (quant.h) for many rows: tiles form the exact sums of a group for 32 rows and 32 columns, then
// each element takes its group as it does with few rows.
#pragma once
#include "amx.h"
#include "quant.h"

#if defined(LS_TILE_INT8)
namespace {

constexpr long kTileRowsFrom = 5;  // fewer rows are faster without tiles
constexpr long kIntRows = 256;     // rows that pass over two panels while these are in the cache

// Two panels beside each other.
struct QuantPair {
  const int8_t* values[2];  // [k / 4][16][4]
  const float *scales[2], *minima[2];
  long groups;  // of kGroup values
};

// 4-bit values as int8.
inline void expand_nibbles(const uint8_t* from, long groups, int offset, int8_t* to) {
  for (long g = 0; g < groups; g++, from += 256, to += 512)
    for (int i = 0; i < 256; i += W * 4) {
      const vi packed = load_bytes(from + i);
      typedef int8_t vb __attribute__((vector_size(W * 4)));
      const vb low = (vb)(packed & 0x0f0f0f0f) - (int8_t)offset;
      const vb high = (vb)((packed >> 4) & 0x0f0f0f0f) - (int8_t)offset;
      memcpy(to + i, &low, sizeof low);
      memcpy(to + 256 + i, &high, sizeof high);
    }
}

// The exact sums of group `g` for one or two tiles of rows and both panels: [row tile * 2 + panel][16][16].
template <int kGroup, bool two>
LS_INLINE void tile_sums(const PreparedGroup* x, const PreparedGroup* x2, const QuantPair& w, long g, int32_t* sums) {
  constexpr int kParts = kInnerGroup / kGroup;
  const int8_t* q = x[g / kParts].values[0] + g % kParts * kGroup;
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  LS_TILE_LOAD(4, q, kInnerGroup);
  LS_TILE_LOAD(6, w.values[0] + g * kGroup * 16, 64);
  LS_TILE_INT8(0, 4, 6);
  LS_TILE_LOAD(7, w.values[1] + g * kGroup * 16, 64);
  LS_TILE_INT8(1, 4, 7);
  if (two) {
    const int8_t* q2 = x2[g / kParts].values[0] + g % kParts * kGroup;
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
    LS_TILE_LOAD(5, q2, kInnerGroup);
    LS_TILE_INT8(2, 5, 6);
    LS_TILE_INT8(3, 5, 7);
  }
  LS_TILE_STORE(0, sums, 64);
  LS_TILE_STORE(1, sums + 256, 64);
  if (two) {
    LS_TILE_STORE(2, sums + 512, 64);
    LS_TILE_STORE(3, sums + 768, 64);
  }
}

// Adds groups g and, if there is one, g + 1 to `height` rows of a tile and one panel; total [16][32].
template <int kGroup, bool kMinimum>
LS_INLINE void add_groups(const PreparedGroup* x, const QuantPair& w, int panel, long g, int count, int height,
                          const int32_t* sums, const int32_t* sums2, float* total) {
  constexpr int kParts = kInnerGroup / kGroup;
  const PreparedGroup &first = x[g / kParts], &second = x[(g + count - 1) / kParts];
  const float *scales = w.scales[panel] + g * 16, *minima = kMinimum ? w.minima[panel] + g * 16 : nullptr;
  for (int c = 0; c < 16; c += W) {
    const vf scale = load(scales + c), scale2 = count > 1 ? load(scales + 16 + c) : vf{};
    const vf minimum = kMinimum ? load(minima + c) : vf{}, minimum2 = kMinimum && count > 1 ? load(minima + 16 + c) : vf{};
    for (int r = 0; r < height; r++) {
      vf y = g ? load(total + r * 32 + c) : vf{};
      y = fma(__builtin_convertvector(load_bytes(sums + r * 16 + c), vf) * first.scale[r], scale, y);
      if (kMinimum) y = fma(splat(first.shift[r]), minimum, y);
      if (count > 1) {
        y = fma(__builtin_convertvector(load_bytes(sums2 + r * 16 + c), vf) * second.scale[r], scale2, y);
        if (kMinimum) y = fma(splat(second.shift[r]), minimum2, y);
      }
      store(total + r * 32 + c, y);
    }
  }
}

// Up to 32 rows, whose first tile is x and second x2, times two panels -> total [32][32]. While the tiles work on two
// groups, the vectors add the two before.
template <int kGroup, bool kMinimum, bool two>
void tile_block(const PreparedGroup* x, const PreparedGroup* x2, const QuantPair& w, int rows, int32_t* sums,
                float* total) {
  const int height = (int)min_of(16, rows), height2 = rows - height;
  const auto form = [&](long g) {
    for (long i = g; i < min_of(w.groups, g + 2); i++)
      tile_sums<kGroup, two>(x, x2, w, i, sums + (g / 2 % 2 * 2 + i - g) * 1024);
  };
  form(0);
  for (long g = 0; g < w.groups; g += 2) {
    if (g + 2 < w.groups) form(g + 2);
    const int32_t *now = sums + g / 2 % 2 * 2048, *next = now + 1024;
    const int count = (int)min_of(2, w.groups - g);
    for (int panel = 0; panel < 2; panel++) {
      add_groups<kGroup, kMinimum>(x, w, panel, g, count, height, now + panel * 256, next + panel * 256,
                                   total + panel * 16);
      if (two)
        add_groups<kGroup, kMinimum>(x2, w, panel, g, count, height2, now + 512 + panel * 256, next + 512 + panel * 256,
                                     total + 16 * 32 + panel * 16);
    }
  }
}

template <int kGroup, bool kMinimum>
void tile_rows(const PreparedGroup* x, const QuantPair& w, int rows, int32_t* sums, float* total) {
  const PreparedGroup* x2 = x + w.groups * kGroup / kInnerGroup;
  (rows > 16 ? tile_block<kGroup, kMinimum, true> : tile_block<kGroup, kMinimum, false>)(x, x2, w, rows, sums, total);
}

inline void int8_multiply(const PackedWeight& w, const PreparedGroup* x, long rows, long first_column,
                          const Output& out, int worker, int workers) {
  const Format f = format_of(w.format);
  const long inner = groups_of(w), parts = kInnerGroup / f.group, panels = (w.n + kColumns - 1) / kColumns;
  const long bytes = quant_panel_bytes(w), pairs = (panels + 1) / 2, row_blocks = (rows + kIntRows - 1) / kIntRows;
  const Share share = share_of(pairs * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  const long scales = inner * parts * 16, values = f.nibbles ? inner * 512 : 0;
  char* scratch = (char*)liushui::scratch(liushui::kProduct, (size_t)(4 * scales * 4 + 2 * values + 4 * 4096 + 4096));
  float *scale_space = (float*)scratch, *total = scale_space + 4 * scales;
  int32_t* sums = (int32_t*)(total + 1024);
  int8_t* expanded = (int8_t*)(sums + 4 * 1024);
  const auto kernel = f.group == 16 ? tile_rows<16, false> : f.minimum ? tile_rows<32, true> : tile_rows<32, false>;
  QuantPair pair = {};
  configure_tiles(16, 16, f.group);
  for (long unit = share.begin, at = -1; unit < share.end; unit++) {
    const long panel = unit / row_blocks * 2, block = unit % row_blocks * kIntRows;
    if (panel != at) {
      at = panel;
      pair.groups = inner * parts;
      for (long p = 0; p < 2; p++) {
        const uint8_t* from = (const uint8_t*)w.data + min_of(panel + p, panels - 1) * bytes;
        float *scale = scale_space + p * 2 * scales, *minima = scale + scales;
        expand_scales(w.format, from + inner * f.value_bytes, inner, scale, minima);
        pair.scales[p] = scale, pair.minima[p] = minima;
        pair.values[p] = f.nibbles ? expanded + p * values : (const int8_t*)from;
        if (f.nibbles) expand_nibbles(from, inner, f.offset, expanded + p * values);
      }
    }
    const long column = panel * kColumns, count = min_of(32, w.n - column);
    for (long row = block; row < min_of(rows, block + kIntRows); row += 32) {
      const int height = (int)min_of(32, rows - row);
      kernel(x + row / 16 * inner, pair, height, sums, total);
      for (int r = 0; r < height; r++)
        emit(out, w.bias ? w.bias + column : nullptr, worker, row + r, first_column + column, count, total + r * 32);
    }
  }
  LS_TILE_RELEASE();
}

}  // namespace
#endif
