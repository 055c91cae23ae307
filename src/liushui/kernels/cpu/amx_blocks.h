// y = x w^T for blocks of integers (expand.h) that tiles multiply as bfloat16. Sums are those of the bfloat16 product:
// an element takes K in steps of 32, in order, and it does not matter which factor is a tile's first (TDPBF16PS: the
// even and the odd terms of a step in a chain each). Here the weight comes first: so it is read where it was expanded,
// 16 columns with 32 values each, and a tile of y is [column][row].
#pragma once
#include "amx.h"
#include "expand.h"
#include "transpose.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr long kWideRows = 512;     // rows for which a panel is expanded once
constexpr long kWideChunk = 2048;   // bytes of 32 columns with 32 values each
constexpr long kExpandAhead = 2;    // a tile that was just written is not there yet
constexpr long kExpandRing = 4;     // chunks kept where nobody needs them a second time
constexpr long kFetchAhead = 8192;  // bytes

// Rows of x as the second factor, [tile of 16 rows][chunk][k / 2 % 16][row][k % 2], zeros past k; a lone row is that
// already.
inline bool wide_direct(long k, long rows) { return k % kInnerGroup == 0 && rows == 1; }

inline size_t wide_prepared_bytes(const PackedWeight& w, long rows) {
  return wide_direct(w.k, rows) ? 0 : (size_t)((rows + kTile - 1) / kTile * groups_of(w) * 1024);
}

inline void wide_rows(long k, const bf16* x, long begin, long end, bf16* prepared) {
  const long chunks = (k + kInnerGroup - 1) / kInnerGroup;
  for (long row = begin; row < end;) {
    bf16* to = prepared + row / kTile * chunks * 512;
    if (k % kInnerGroup == 0 && row % kTile == 0 && row + kTile <= end) {
      for (long chunk = 0; chunk < chunks; chunk++)
        transpose_words((const uint32_t*)(x + row * k + chunk * kInnerGroup), k / 2, (uint32_t*)(to + chunk * 512));
      row += kTile;
      continue;
    }
    for (long chunk = 0; chunk < chunks; chunk++) {
      bf16 values[kInnerGroup] = {};
      memcpy((void*)values, x + row * k + chunk * kInnerGroup, (size_t)min_of(kInnerGroup, k - chunk * kInnerGroup) * 2);
      for (int pair = 0; pair < 16; pair++)
        memcpy((void*)(to + chunk * 512 + pair * 32 + row % kTile * 2), values + 2 * pair, 4);
    }
    row++;
  }
}

// Tiles 0 to 3 hold sums (1 and 3 of the second 16 columns, 2 and 3 of the second rows), 4 and 5 the weight, 6 and 7
// rows of x, `rows` of them.
inline void configure_wide(int rows) {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    config.rows[t] = kTile;
    config.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? 64 : 4 * rows);
  }
  LS_TILE_CONFIG(&config);
}

// One or two tiles of rows; where the first begins, how far they, their chunks and the rows of a chunk lie apart.
struct WideX {
  const char* first;
  long tile, chunk, stride;
};

template <bool kTwo>
LS_INLINE void clear_sums() {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  if (kTwo) {
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
  }
}

template <bool kTwo>
LS_INLINE void add_chunk(const WideX& x, long chunk, const char* w) {
  const char* from = x.first + chunk * x.chunk;
  LS_TILE_LOAD(4, w, 64);
  LS_TILE_LOAD(6, from, x.stride);
  LS_TILE_BF16(0, 4, 6);
  LS_TILE_LOAD(5, w + 1024, 64);
  LS_TILE_BF16(1, 5, 6);
  if (kTwo) {
    LS_TILE_LOAD(7, from + x.tile, x.stride);
    LS_TILE_BF16(2, 4, 7);
    LS_TILE_BF16(3, 5, 7);
  }
}

// The panel is expanded, to chunk i modulo `ring` of `expanded`, and multiplied with the first rows meanwhile.
template <bool kTwo>
void expand_and_add(const WideX& x, const uint8_t* panel, long bytes, long chunks, ExpandGroup expand, char* expanded,
                    long ring) {
  const auto make = [&](long i) {
    const uint8_t* ahead = panel + i * bytes / chunks + kFetchAhead;
    for (long at = 0; at < bytes / chunks; at += 64) __builtin_prefetch(ahead + at, 0, 3);
    expand(panel, i, (bf16*)(expanded + i % ring * kWideChunk));
  };
  clear_sums<kTwo>();
  for (long i = 0; i < min_of(kExpandAhead, chunks); i++) make(i);
  for (long i = 0; i < chunks; i++) {
    if (i + kExpandAhead < chunks) make(i + kExpandAhead);
    add_chunk<kTwo>(x, i, expanded + i % ring * kWideChunk);
  }
}

template <bool kTwo>
void add_expanded(const WideX& x, long chunks, const char* expanded) {
  clear_sums<kTwo>();
  for (long i = 0; i < chunks; i++) add_chunk<kTwo>(x, i, expanded + i * kWideChunk);
}

// The tiles' sums -> y [32 rows][32 columns]; `sums`: 4 tiles.
inline void take_sums(long rows, uint32_t* sums, float* y) {
  LS_TILE_STORE(0, sums, 64);
  LS_TILE_STORE(1, sums + 256, 64);
  transpose_words(sums, 16, (uint32_t*)y, kWide);
  transpose_words(sums + 256, 16, (uint32_t*)y + kTile, kWide);
  if (rows <= kTile) return;
  LS_TILE_STORE(2, sums + 512, 64);
  LS_TILE_STORE(3, sums + 768, 64);
  transpose_words(sums + 512, 16, (uint32_t*)y + kTile * kWide, kWide);
  transpose_words(sums + 768, 16, (uint32_t*)y + kTile * kWide + kTile, kWide);
}

inline void wide_multiply(const PackedWeight& w, const void* x, long rows, long first_column, const Output& out,
                          int worker, int workers) {
  const long chunks = groups_of(w), panels = (w.n + kWide - 1) / kWide, bytes = wide_panel_bytes(w);
  const long row_blocks = (rows + kWideRows - 1) / kWideRows, tile = chunks * 1024;
  const Share share = share_of(panels * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  const bool lone = wide_direct(w.k, rows);
  const long ring = rows <= 2 * kTile ? kExpandRing : chunks;
  char* expanded = (char*)liushui::scratch(liushui::kProduct, (size_t)(ring * kWideChunk + 8192));
  uint32_t* sums = (uint32_t*)(expanded + ring * kWideChunk);
  float* y = (float*)(sums + 1024);
  const ExpandGroup expand = expander(w.format);
  configure_wide(lone ? 1 : kTile);
  for (long unit = share.begin; unit < share.end; unit++) {
    const long panel = unit / row_blocks, block = unit % row_blocks * kWideRows, end = min_of(rows, block + kWideRows);
    const uint8_t* held = (const uint8_t*)w.data + panel * bytes;
    const long column = panel * kWide, count = min_of(kWide, w.n - column);
    for (long row = block; row < end; row += 2 * kTile) {
      const long height = min_of(2 * kTile, end - row);
      const WideX from = lone ? WideX{(const char*)x, 0, 64, 4}
                              : WideX{(const char*)x + row / kTile * tile, tile, 1024, 64};
      if (row == block)
        (height > kTile ? expand_and_add<true> : expand_and_add<false>)(from, held, bytes, chunks, expand, expanded,
                                                                       ring);
      else
        (height > kTile ? add_expanded<true> : add_expanded<false>)(from, chunks, expanded);
      if (lone) {
        LS_TILE_STORE(0, y, 4);
        LS_TILE_STORE(1, y + kTile, 4);
      } else {
        take_sums(height, sums, y);
      }
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, y, kWide);
    }
  }
  LS_TILE_RELEASE();
}

}  // namespace
#endif
