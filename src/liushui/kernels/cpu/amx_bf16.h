// y = x w^T in bfloat16 with tiles. The weight lies in panels of 16 columns, [panel][k / 32][k / 2 % 16][column][k % 2],
// a tile of 1 KiB after the other. Every element of y is one tile's element that takes K in steps of 32, in order,
// whatever the tile's height: one row and 512 give the same bits.
#pragma once
#include "amx.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr long kTileBytes = 1024;
constexpr long kBf16Rows = 512;      // rows that pass over two panels while these are in the cache
constexpr long kDirectRows = 2 * kTile;  // up to here rows are read where they lie

inline long bf16_chunks(long k) { return (k + kInnerGroup - 1) / kInnerGroup; }

// Rows as they are (in any tile height), or [tile of 16 rows][chunk][16][32] with zeros past k.
inline bool bf16_direct(long k, int x_type, long rows) {
  return x_type == liushui::kBFloat16 && k % kInnerGroup == 0 && rows <= kDirectRows;
}

template <class T>
void bf16_rows(long k, const T* x, long begin, long end, bf16* prepared) {
  const long chunks = bf16_chunks(k);
  for (long row = begin; row < end; row++) {
    bf16* to = prepared + (row / kTile * chunks * kTile + row % kTile) * kInnerGroup;
    for (long chunk = 0; chunk < chunks; chunk++, to += kTile * kInnerGroup)
      for (long i = 0; i < kInnerGroup; i += W) {
        const long left = k - chunk * kInnerGroup - i;
        store(to + i, left > 0 ? load_up_to(x + row * k + chunk * kInnerGroup + i, left) : vf{});
      }
  }
}

inline void bf16_pack_panel(const bf16* weight, long width, long k, long panel, bf16* data) {
  const long chunks = bf16_chunks(k);
  bf16* to = data + panel * chunks * kTileBytes / 2;
  memset((void*)to, 0, (size_t)(chunks * kTileBytes));
  for (long c = 0; c < kColumns && panel * kColumns + c < width; c++)
    for (long i = 0; i < k; i++)
      to[i / 32 * 512 + i % 32 / 2 * 32 + c * 2 + i % 2] = weight[(panel * kColumns + c) * k + i];
}

inline void bf16_embed(const PackedWeight& w, long row, float* out) {
  const bf16* from = (const bf16*)w.data + row / kColumns * bf16_chunks(w.k) * kTileBytes / 2 + row % kColumns * 2;
  for (long i = 0; i < w.k; i++) out[i] = widen(from[i / 32 * 512 + i % 32 / 2 * 32 + i % 2]);
}

// Where a tile of x begins, how far its rows and its chunks lie apart.
struct TileRows {
  const char* first;
  long row_bytes, chunk_bytes;
};

// One or two tiles of rows times two panels; sums to y [32][32].
inline void bf16_block(const TileRows* x, bool two, const char* panel, const char* panel2, long chunks, float* y) {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  if (two) {
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
    for (long i = 0; i < chunks; i++) {
      LS_TILE_LOAD(6, panel + i * kTileBytes, 64);
      LS_TILE_LOAD(4, x[0].first + i * x[0].chunk_bytes, x[0].row_bytes);
      LS_TILE_BF16(0, 4, 6);
      LS_TILE_LOAD(7, panel2 + i * kTileBytes, 64);
      LS_TILE_BF16(1, 4, 7);
      LS_TILE_LOAD(5, x[1].first + i * x[1].chunk_bytes, x[1].row_bytes);
      LS_TILE_BF16(2, 5, 6);
      LS_TILE_BF16(3, 5, 7);
    }
    LS_TILE_STORE(2, y + kTile * 32, 128);
    LS_TILE_STORE(3, y + kTile * 32 + kTile, 128);
  } else {
    for (long i = 0; i < chunks; i++) {
      for (long ahead = 0; ahead < kTileBytes; ahead += 64) {  // a step on in both panels, or in what follows them
        __builtin_prefetch(panel + (i + 4) * kTileBytes + ahead, 0, 3);
        __builtin_prefetch(panel2 + (i + 4) * kTileBytes + ahead, 0, 3);
      }
      LS_TILE_LOAD(4, x[0].first + i * x[0].chunk_bytes, x[0].row_bytes);
      LS_TILE_LOAD(6, panel + i * kTileBytes, 64);
      LS_TILE_BF16(0, 4, 6);
      LS_TILE_LOAD(7, panel2 + i * kTileBytes, 64);
      LS_TILE_BF16(1, 4, 7);
    }
  }
  LS_TILE_STORE(0, y, 128);
  LS_TILE_STORE(1, y + kTile, 128);
}

inline void bf16_multiply(const PackedWeight& w, const void* x, int x_type, long rows, long first_column,
                          const Output& out, int worker, int workers) {
  const long chunks = bf16_chunks(w.k), panels = (w.n + kColumns - 1) / kColumns, pairs = (panels + 1) / 2;
  const long row_blocks = (rows + kBf16Rows - 1) / kBf16Rows;
  const bool direct = bf16_direct(w.k, x_type, rows);
  const long row_bytes = direct ? w.k * 2 : 64, chunk_bytes = direct ? 64 : kTileBytes;
  const long tile_bytes = direct ? kTile * w.k * 2 : chunks * kTileBytes;
  float* y = (float*)liushui::scratch(liushui::kProduct, 32 * 32 * sizeof(float));
  const Share share = share_of(pairs * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  const int height = direct ? (int)min_of(kTile, rows) : kTile;  // prepared rows are whole tiles
  const int height2 = direct ? (int)max_of(0, rows - kTile) : kTile;
  configure_tiles(height, height2, 64);
  for (long unit = share.begin; unit < share.end; unit++) {
    const long panel = unit / row_blocks * 2, block = unit % row_blocks * kBf16Rows;
    const char* first = (const char*)w.data + panel * chunks * kTileBytes;
    const char* second = panel + 1 < panels ? first + chunks * kTileBytes : first;
    const long column = panel * kColumns, count = min_of(32, w.n - column);
    for (long row = block; row < min_of(rows, block + kBf16Rows); row += 2 * kTile) {
      const char* from = (const char*)x + row / kTile * tile_bytes;
      const TileRows tiles[2] = {{from, row_bytes, chunk_bytes}, {from + tile_bytes, row_bytes, chunk_bytes}};
      const long last = min_of(rows, row + 2 * kTile);
      bf16_block(tiles, last > row + kTile, first, second, chunks, y);
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, last - row, first_column + column, count, y, 32);
    }
  }
  LS_TILE_RELEASE();
}

}  // namespace
#endif
