// The tile instructions, as macros with literal tile numbers. Written out, not taken from the compiler's header:
// that of gcc 12 names 8 bytes of the configuration only, and no memory at all for loads, so that what was written
// before may come too late or never. In the test build software stands in for the machine.
#pragma once
#include "product.h"

#if defined(LS_EMULATE_AMX)
#include "emulate.h"
#elif defined(__AMX_TILE__)
#define LS_TILE_CONFIG(config) \
  asm volatile("ldtilecfg %0" ::"m"(*(const TileConfig*)(config)) : "memory")
#define LS_TILE_RELEASE() asm volatile("tilerelease" ::: "memory")
#define LS_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define LS_TILE_LOAD(t, base, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void*)(base)), "r"((long)(stride)) : "memory")
#define LS_TILE_STORE(t, base, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void*)(base)), "r"((long)(stride)) : "memory")
#define LS_TILE_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#define LS_TILE_INT8(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")
#endif

#if !defined(LS_TILE_BF16) && defined(__AVX512BF16__) && LS_WIDTH == 16
#define LS_BF16_VECTORS 1  // the layouts of tiles, multiplied by vectors (pairs.h)
#endif
#if defined(LS_TILE_BF16) || defined(LS_BF16_VECTORS)
#define LS_BF16 1  // bfloat16 is multiplied as such
namespace {
constexpr int kTile = 16;  // rows of a tile
}
#endif

#if defined(LS_TILE_BF16)
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as ldtilecfg reads it");

// Tiles 0 to 3 hold sums, 4 and 5 rows of x (the first of them `height` rows, as sums 0 and 1), 6 and 7 the weight.
// `depth`: bytes of x in a tile's row; the weight's tile has depth / 4 rows of 64 bytes.
inline void configure_tiles(int height, int height2, int depth) {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    const int rows = t >= 6 ? depth / 4 : t == 4 || t < 2 ? height : height2;
    config.rows[t] = (uint8_t)rows;
    config.row_bytes[t] = (uint16_t)(rows == 0 ? 0 : t == 4 || t == 5 ? depth : 64);
  }
  LS_TILE_CONFIG(&config);
}

}  // namespace
#endif
