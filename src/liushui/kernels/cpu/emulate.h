// For tests alone: the tile and VNNI instructions in software, so that the code which uses them runs on any machine.
// Semantics as in Intel's Software Developer's Manual, volume 2 (TDPBF16PS, TDPBSSD, TILELOADD, VPDPBUSD).
#pragma once
#include <stdlib.h>

#include "emulate_vectors.h"

namespace {

struct EmulatedTiles {
  uint8_t palette;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
thread_local EmulatedTiles tiles;

inline void check_tile(bool right) {
  if (!right) abort();  // the machine would raise #UD
}

LS_OUT_OF_LINE void emulate_config(const void* memory) {
  const uint8_t* config = (const uint8_t*)memory;
  memset(&tiles, 0, sizeof tiles);
  tiles.palette = config[0];
  check_tile(tiles.palette == 1);
  for (int i = 2; i < 16; i++) check_tile(config[i] == 0);
  memcpy(tiles.row_bytes, config + 16, sizeof tiles.row_bytes);
  memcpy(tiles.rows, config + 48, sizeof tiles.rows);
  for (int t = 0; t < 8; t++) check_tile(tiles.row_bytes[t] <= 64 && tiles.rows[t] <= 16);
}

LS_OUT_OF_LINE void emulate_load(int t, const void* base, long stride) {
  check_tile(tiles.palette && tiles.rows[t]);
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int r = 0; r < tiles.rows[t]; r++)
    memcpy(tiles.data[t][r], (const char*)base + r * stride, tiles.row_bytes[t]);
}

LS_OUT_OF_LINE void emulate_store(int t, void* base, long stride) {
  check_tile(tiles.palette && tiles.rows[t]);
  for (int r = 0; r < tiles.rows[t]; r++) memcpy((char*)base + r * stride, tiles.data[t][r], tiles.row_bytes[t]);
}

inline void check_shapes(int c, int a, int b) {
  check_tile(tiles.palette && tiles.rows[c] && tiles.rows[c] == tiles.rows[a]);
  check_tile(tiles.row_bytes[c] == tiles.row_bytes[b] && tiles.row_bytes[a] == 4 * tiles.rows[b]);
}

using soft::flushed;

inline float bf16_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  return soft::widened(half);
}

// Even and odd terms in a chain of fused operations each, from zero; their sum is added to the tile.
LS_OUT_OF_LINE void emulate_bf16(int c, int a, int b) {
  check_shapes(c, a, b);
  for (int m = 0; m < tiles.rows[c]; m++)
    for (int n = 0; n < tiles.row_bytes[c] / 4; n++) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < tiles.rows[b]; k++) {
        const uint8_t *x = tiles.data[a][m] + 4 * k, *y = tiles.data[b][k] + 4 * n;
        even = flushed(__builtin_fmaf(bf16_at(x), bf16_at(y), even));
        odd = flushed(__builtin_fmaf(bf16_at(x + 2), bf16_at(y + 2), odd));
      }
      memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
    }
}

LS_OUT_OF_LINE void emulate_int8(int c, int a, int b) {
  check_shapes(c, a, b);
  for (int m = 0; m < tiles.rows[c]; m++)
    for (int n = 0; n < tiles.row_bytes[c] / 4; n++) {
      int32_t sum;
      memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
      for (int k = 0; k < tiles.rows[b]; k++)
        for (int i = 0; i < 4; i++)
          sum += (int)(int8_t)tiles.data[a][m][4 * k + i] * (int)(int8_t)tiles.data[b][k][4 * n + i];
      memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
    }
}

#define LS_TILE_CONFIG(config) emulate_config(config)
#define LS_TILE_RELEASE() memset(&tiles, 0, sizeof tiles)
#define LS_TILE_ZERO(t) (check_tile(tiles.palette), memset(tiles.data[t], 0, sizeof tiles.data[t]))
#define LS_TILE_LOAD(t, base, stride) emulate_load(t, base, stride)
#define LS_TILE_STORE(t, base, stride) emulate_store(t, base, stride)
#define LS_TILE_BF16(c, a, b) emulate_bf16(c, a, b)
#define LS_TILE_INT8(c, a, b) emulate_int8(c, a, b)

}  // namespace
