// The integer products (quant.h) for many rows: a tile forms the exact sums of a group for 16 rows and 16 columns, then
// each element takes its group as it does with few rows.
#pragma once
#include "amx.h"
#include "quant.h"

#if defined(LS_TILE_INT8)
namespace {

constexpr long kTileRowsFrom = 17;  // fewer rows are faster without tiles (measured on Sapphire Rapids)
constexpr long kIntRows = 256;     // rows that pass over a panel while it is in the cache

// 4-bit values as int8.
inline void expand_nibbles(const uint8_t* from, long groups, int offset, int8_t* to) {
  typedef int8_t vb __attribute__((vector_size(W * 4)));
  for (long g = 0; g < groups; g++, from += 256, to += 512)
    for (int i = 0; i < 256; i += W * 4) {
      const vi packed = load_bytes(from + i);
      const vb low = (vb)(packed & 0x0f0f0f0f) - (int8_t)offset;
      const vb high = (vb)((packed >> 4) & 0x0f0f0f0f) - (int8_t)offset;
      memcpy(to + i, &low, sizeof low);
      memcpy(to + 256 + i, &high, sizeof high);
    }
}

// One panel, its values as int8.
struct TilePanel {
  const int8_t* values;  // [k / 4][16][4]
  const uint16_t* halves;
  const float *scales, *minima;
  long groups;  // of the format's size
};

// The exact sums of group g with both bytes of x, [high, low][16][16]. Two pairs of tiles and four places take turns,
// so that a group need not wait for the one before.
#define LS_FORM(first, second)                       \
  do {                                               \
    LS_TILE_ZERO(first);                             \
    LS_TILE_ZERO(second);                            \
    LS_TILE_LOAD(6, w.values + g * kGroup * 16, 64); \
    LS_TILE_LOAD(4, high, kInnerGroup);              \
    LS_TILE_INT8(first, 4, 6);                       \
    LS_TILE_LOAD(5, low, kInnerGroup);               \
    LS_TILE_INT8(second, 5, 6);                      \
    LS_TILE_STORE(first, place, 64);                 \
    LS_TILE_STORE(second, place + 256, 64);          \
  } while (0)

template <int kGroup>
LS_INLINE void form_sums(const PreparedGroup* x, const TilePanel& w, long g, int32_t* sums) {
  constexpr int kParts = kInnerGroup / kGroup;
  const int8_t* high = x[g / kParts].high[0] + g % kParts * kGroup;
  const int8_t* low = x[g / kParts].low[0] + g % kParts * kGroup;
  int32_t* place = sums + g % 4 * 512;
  if (g % 2)
    LS_FORM(2, 3);
  else
    LS_FORM(0, 1);
}
#undef LS_FORM

// The first H rows of a tile times one panel -> total [H][16]. Tiles are two groups ahead of the vectors.
template <class F, int H>
void tile_rows(const PreparedGroup* x, const TilePanel& w, int32_t* sums, float* total) {
  constexpr int kParts = kInnerGroup / F::kGroup, kHalves = F::kMinimum ? 32 : 16;
  for (int c = 0; c < 16; c += W) {
    vf y[H];
#pragma GCC unroll 16
    for (int r = 0; r < H; r++) y[r] = vf{};
    form_sums<F::kGroup>(x, w, 0, sums);
    if (w.groups > 1) form_sums<F::kGroup>(x, w, 1, sums);
    for (long g = 0; g < w.groups; g++) {
      if (g + 2 < w.groups) form_sums<F::kGroup>(x, w, g + 2, sums);
      const uint16_t* half = w.halves + g * kHalves + c;
      const vf scale = F::kDirect ? load_half(half) : load(w.scales + g * 16 + c);
      const vf minimum = !F::kMinimum ? vf{} : F::kDirect ? load_half(half + 16) : load(w.minima + g * 16 + c);
      const PreparedGroup& rows = x[g / kParts];
      const int32_t *high = sums + g % 4 * 512 + c, *low = high + 256;
#pragma GCC unroll 16
      for (int r = 0; r < H; r++) {
        const vi exact = (load_bytes(high + r * 16) << 8) + load_bytes(low + r * 16);
        y[r] = fma(__builtin_convertvector(exact, vf) * rows.scale[r], scale, y[r]);
        if (F::kMinimum) y[r] = fma(splat(rows.shift[r]), minimum, y[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < H; r++) store(total + r * 16 + c, y[r]);
  }
}

using TileKernel = void (*)(const PreparedGroup*, const TilePanel&, int32_t*, float*);

template <int H>
TileKernel tile_kernel(int format) {
  switch (format) {
    case liushui::kInt4: return tile_rows<Held<true, 8, 32, false, true>, H>;
    case liushui::kInt4Min: return tile_rows<Held<true, 0, 32, true, true>, H>;
    case liushui::kInt4K: return tile_rows<Held<true, 0, 32, true, false>, H>;
    case liushui::kInt6K: return tile_rows<Held<false, 0, 16, false, false>, H>;
    default: return tile_rows<Held<false, 0, 32, false, true>, H>;
  }
}

inline void int8_multiply(const PackedWeight& w, const PreparedGroup* x, long rows, long first_column,
                          const Output& out, int worker, int workers) {
  const Format f = format_of(w.format);
  const long inner = groups_of(w), panels = (w.n + kColumns - 1) / kColumns, bytes = quant_panel_bytes(w);
  const long row_blocks = (rows + kIntRows - 1) / kIntRows, count = inner * (kInnerGroup / f.group) * 16;
  const Share share = share_of(panels * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  const bool direct = scales_direct(w.format);
  const long values = f.nibbles ? inner * 512 : 0, floats = direct ? 0 : 2 * count;
  char* scratch = (char*)liushui::scratch(liushui::kProduct, (size_t)(8192 + 1024 + floats * 4 + values));
  int32_t* sums = (int32_t*)scratch;
  float *total = (float*)(sums + 2048), *scales = total + 256;
  int8_t* expanded = (int8_t*)(scales + floats);
  const TileKernel whole = tile_kernel<16>(w.format), half = tile_kernel<8>(w.format);
  TilePanel panel = {nullptr, nullptr, scales, scales + count, inner * (kInnerGroup / f.group)};
  configure_tiles(16, 16, f.group);
  long at = -1;
  for (long unit = share.begin; unit < share.end; unit++) {
    const long row = unit % row_blocks * kIntRows, end = min_of(rows, row + kIntRows);
    if (unit / row_blocks != at) {
      at = unit / row_blocks;
      const uint8_t *from = (const uint8_t*)w.data + at * bytes, *held = from + inner * f.value_bytes;
      panel.values = f.nibbles ? expanded : (const int8_t*)from;
      panel.halves = (const uint16_t*)held;
      if (f.nibbles) expand_nibbles(from, inner, f.offset, expanded);
      if (!direct) expand_scales(w.format, held, inner, scales, scales + count);
    }
    const long column = at * kColumns, width = min_of(kColumns, w.n - column);
    for (long r = row; r < end; r += 16) {
      const long height = min_of(16, end - r);
      (height > 8 ? whole : half)(x + r / 16 * inner, panel, sums, total);
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, r, height, first_column + column, width, total, 16);
    }
  }
  LS_TILE_RELEASE();
}

}  // namespace
#endif
