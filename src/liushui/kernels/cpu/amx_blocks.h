// y = x w^T for blocks of integers (expand.h) that tiles multiply as bfloat16. Sums are those of the bfloat16 product:
// an element takes K in steps of 32, in order, and it does not matter which factor is a tile's first (TDPBF16PS: the
// even and the odd terms of a step in a chain each). Values that are looked up are a column's one after the other: there
// the weight comes first, 16 columns with 32 values each, and a tile of y is [column][row]. Where it comes second
// (weight_second), a tile of y is [row][column].
#pragma once
#include "amx.h"
#include "expand.h"
#include "transpose.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr long kWideRows = 512;     // rows for which a panel is expanded once
constexpr long kWideChunk = 2048;   // bytes of 32 columns with 32 values each
constexpr long kWideTile = kWideChunk / 2;
constexpr long kWideDepth = 18;     // chunks that are expanded at a time, to stay in the nearest cache
constexpr long kTilesAhead = 3;     // expanded before one is multiplied; 1 to 15 take the same time, within 4 %
constexpr long kTileRing = 4;       // tiles kept where nobody needs them a second time
constexpr long kFetchAhead = 8192;  // bytes of the packed weight; 2 to 16 KiB, or in two stages, make no difference
constexpr long kFetchRows = 2;      // chunks of x: a tile from the second cache takes far longer than its products

// Rows of x as the second factor, [tile of 16 rows][chunk][k / 2 % 16][row][k % 2], or as the first one, [tile][chunk]
// [row][k % 32], zeros past k; for stacked weights of both kinds a tile's second factor, then its first one. A lone row
// needs nothing of this.
inline bool wide_direct(long k, long rows) { return k % kInnerGroup == 0 && rows == 1; }

struct WideForms {
  long k;
  bool pairs = false, rows = false;  // x as the second, as the first factor

  explicit WideForms(const PackedWeight& weight) : k(weight.k) {
    for (const PackedWeight* w = &weight; w; w = w->next)
      (weight_second(plain_format(w->format)) ? rows : pairs) = true;
  }
  long chunks() const { return (k + kInnerGroup - 1) / kInnerGroup; }
  long tile() const { return chunks() * 512 * (pairs + rows); }  // elements of a tile of 16 rows
  long first(const PackedWeight& w) const { return pairs && weight_second(plain_format(w.format)) ? chunks() * 512 : 0; }
};

inline size_t wide_prepared_bytes(const PackedWeight& w, long rows) {
  return wide_direct(w.k, rows) ? 0 : (size_t)((rows + kTile - 1) / kTile * WideForms(w).tile()) * sizeof(bf16);
}

// x: row `begin`; prepared: of row 0, `tile` elements to the next tile.
inline void wide_first_rows(long k, long tile, const bf16* x, long begin, long end, bf16* prepared) {
  for (long row = begin; row < end; row++, x += k) {
    bf16* to = prepared + row / kTile * tile + row % kTile * kInnerGroup;
    for (long at = 0; at < k; at += kInnerGroup, to += 512) {
      const long count = min_of(kInnerGroup, k - at);
      if (count < kInnerGroup) memset((void*)to, 0, kInnerGroup * sizeof(bf16));
      memcpy((void*)to, x + at, (size_t)count * sizeof(bf16));
    }
  }
}

inline void wide_pair_rows(long k, long tile, const bf16* x, long begin, long end, bf16* prepared) {
  const long chunks = (k + kInnerGroup - 1) / kInnerGroup;
  for (long row = begin; row < end;) {
    bf16* to = prepared + row / kTile * tile;
    if (k % kInnerGroup == 0 && row % kTile == 0 && row + kTile <= end) {
      for (long chunk = 0; chunk < chunks; chunk++)
        transpose_words((const uint32_t*)(x + (row - begin) * k + chunk * kInnerGroup), k / 2, (uint32_t*)(to + chunk * 512));
      row += kTile;
      continue;
    }
    for (long chunk = 0; chunk < chunks; chunk++) {
      bf16 values[kInnerGroup] = {};
      memcpy((void*)values, x + (row - begin) * k + chunk * kInnerGroup, (size_t)min_of(kInnerGroup, k - chunk * kInnerGroup) * 2);
      for (int pair = 0; pair < 16; pair++)
        memcpy((void*)(to + chunk * 512 + pair * 32 + row % kTile * 2), values + 2 * pair, 4);
    }
    row++;
  }
}

inline void wide_rows(const PackedWeight& w, const bf16* x, long begin, long end, bf16* prepared) {
  const WideForms forms(w);
  if (forms.pairs) wide_pair_rows(w.k, forms.tile(), x, begin, end, prepared);
  if (forms.rows) wide_first_rows(w.k, forms.tile(), x, begin, end, prepared + (forms.pairs ? forms.chunks() * 512 : 0));
}

// Tiles 0 to 3 hold sums (1 and 3 of the second 16 columns, 2 and 3 of the second rows), 4 and 5 the weight, 6 and 7
// `rows` rows of x: columns of a tile, or (second) rows, of which a product takes the fewer the less time.
inline void configure_wide(int rows, bool second) {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    const bool weight = t == 4 || t == 5;
    config.rows[t] = (uint8_t)(weight || !second ? kTile : rows);
    config.row_bytes[t] = (uint16_t)(weight || second ? 64 : 4 * rows);
  }
  LS_TILE_CONFIG(&config);
}

// A pair of tiles of rows: where the first chunk begins, how far tiles and chunks lie apart.
struct WideX {
  const char* first;
  long tile, chunk;
};

// Sums of a pair of tiles of rows, [4][16][16]; without an address they begin at zero.
template <bool kTwo>
LS_INLINE void begin_sums(const uint32_t* sums) {
  if (!sums) {
    LS_TILE_ZERO(0);
    LS_TILE_ZERO(1);
    if (!kTwo) return;
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
  } else {
    LS_TILE_LOAD(0, sums, 64);
    LS_TILE_LOAD(1, sums + 256, 64);
    if (!kTwo) return;
    LS_TILE_LOAD(2, sums + 512, 64);
    LS_TILE_LOAD(3, sums + 768, 64);
  }
}

template <int kLines>
LS_INLINE void fetch_lines(const void* p) {
#pragma GCC unroll 32
  for (int i = 0; i < kLines; i++) __builtin_prefetch((const char*)p + i * 64, 0, 3);
}

// Expands the tiles of a panel, or of several that lie one after the other, in order: two of each group.
template <int kPlain>
struct TileMaker {
  const uint8_t* panel;
  long first, end;  // tiles
  char* to;
  long mask;  // of places, which tiles take in turn
  long next = first;

  LS_INLINE char* place(long tile) const { return to + ((tile - first) & mask) * kWideTile; }
  // kSecond: whether the next one holds a group's second 16 columns.
  template <bool kSecond>
  LS_INLINE void make() {
    if (next == end) return;
    constexpr WideLayout layout = wide_layout(kPlain);
    constexpr long kBytes = (layout.group + layout.header / 8) / 2;
    const uint8_t* group = panel + layout.at(next / 2);
    fetch_lines<(int)((kBytes + 63) / 64)>(group + kSecond * kBytes + kFetchAhead);
    expand_tile<kPlain>(group, panel + layout.header_at(next / 2), kSecond, (bf16*)place(next));
    next++;
  }
  // The first ones.
  LS_INLINE void begin() {
    make<false>();
    make<true>();
    make<false>();
    static_assert(kTilesAhead == 3, "as many");
  }
};

// Tile `sum` += the product of tile `w` of the weight and tile `x` of rows.
#define LS_WIDE_ADD(sum, w, x) \
  do {                         \
    if (kSecond)               \
      LS_TILE_BF16(sum, x, w); \
    else                       \
      LS_TILE_BF16(sum, w, x); \
  } while (0)

template <bool kSecond, bool kTwo>
LS_INLINE void add_chunk(const WideX& x, const char* from, const char* next, const char* w) {
  LS_TILE_LOAD(4, w, 64);
  LS_TILE_LOAD(6, from, 64);
  fetch_lines<16>(next);
  LS_WIDE_ADD(0, 4, 6);
  LS_TILE_LOAD(5, w + kWideTile, 64);
  LS_WIDE_ADD(1, 5, 6);
  if (!kTwo) return;
  LS_TILE_LOAD(7, from + x.tile, 64);
  fetch_lines<16>(next + x.tile);
  LS_WIDE_ADD(2, 4, 7);
  LS_WIDE_ADD(3, 5, 7);
}

// Groups [g, g + chunks) of the panel are expanded, to `mask` + 1 places of `expanded` in turn (-1: all), and multiplied
// with the first rows meanwhile.
template <int kPlain, bool kTwo>
void expand_and_add(const WideX& x, const uint8_t* panel, long g, long chunks, char* expanded, long mask,
                    const uint32_t* sums) {
  constexpr bool kSecond = weight_second(kPlain);
  TileMaker<kPlain> maker = {panel, 2 * g, 2 * (g + chunks), expanded, mask};
  begin_sums<kTwo>(sums);
  maker.begin();
  const char* from = x.first;
  for (long t = maker.first; t < maker.end; t += 2, from += x.chunk) {
    const char* next = from + kFetchRows * x.chunk;
    maker.template make<true>();
    LS_TILE_LOAD(4, maker.place(t), 64);
    LS_TILE_LOAD(6, from, 64);
    fetch_lines<16>(next);
    LS_WIDE_ADD(0, 4, 6);
    if (kTwo) {
      LS_TILE_LOAD(7, from + x.tile, 64);
      fetch_lines<16>(next + x.tile);
      LS_WIDE_ADD(2, 4, 7);
    }
    maker.template make<false>();
    LS_TILE_LOAD(5, maker.place(t + 1), 64);
    LS_WIDE_ADD(1, 5, 6);
    if (kTwo) LS_WIDE_ADD(3, 5, 7);
  }
}

// The same with what was expanded. The next pair of tiles follows.
template <bool kSecond, bool kTwo>
void add_expanded(const WideX& x, long chunks, const char* expanded, const uint32_t* sums) {
  begin_sums<kTwo>(sums);
  const char *from = x.first, *waiting = (const char*)(sums ? sums + 1024 : nullptr);
  for (long i = 0; i < chunks; i++, from += x.chunk, expanded += kWideChunk) {
    const char* next = from + kFetchRows * x.chunk + (i + kFetchRows < chunks ? 0 : 2 * x.tile - chunks * x.chunk);
    add_chunk<kSecond, kTwo>(x, from, next, expanded);
    if (waiting) fetch_lines<4>(waiting + i * 256);
  }
}

template <bool kTwo>
LS_INLINE void store_sums(uint32_t* sums) {
  LS_TILE_STORE(0, sums, 64);
  LS_TILE_STORE(1, sums + 256, 64);
  if (!kTwo) return;
  LS_TILE_STORE(2, sums + 512, 64);
  LS_TILE_STORE(3, sums + 768, 64);
}

// Sums -> y [32 rows][32 columns].
inline void place_sums(const uint32_t* sums, bool two, bool turn, float* y) {
  for (int t = 0; t < (two ? 4 : 2); t++) {
    uint32_t* to = (uint32_t*)y + t / 2 * kTile * kWide + t % 2 * kTile;
    if (turn) {
      transpose_words(sums + t * 256, 16, to, kWide);
      continue;
    }
    for (int row = 0; row < kTile; row++) memcpy(to + row * kWide, sums + t * 256 + row * 16, 64);
  }
}

// One panel for rows [begin, end), at most kWideRows.
struct WideTask {
  const PackedWeight& w;
  const char* x;
  long tile;  // bytes from one tile of rows to the next
  long begin, end, panel;
  char* expanded;
  uint32_t* sums;  // of kWideRows rows
};

// Calls done(row, height, sums [4][16][16]) for each pair of tiles of rows as it is done.
template <int kPlain, class Done>
void wide_panel_of(const WideTask& a, const Done& done) {
  constexpr bool kSecond = weight_second(kPlain);
  const long chunks = groups_of(a.w), pairs = (a.end - a.begin + 2 * kTile - 1) / (2 * kTile);
  const long blocks = pairs == 1 ? 1 : (chunks + kWideDepth - 1) / kWideDepth, mask = pairs == 1 ? kTileRing - 1 : -1;
  const uint8_t* held = (const uint8_t*)a.w.data + a.panel * wide_panel_bytes(a.w);
  for (long block = 0; block < blocks; block++) {
    const long g = chunks * block / blocks, depth = chunks * (block + 1) / blocks - g;
    for (long pair = 0; pair < pairs; pair++) {
      const long row = a.begin + pair * 2 * kTile, height = min_of(2 * kTile, a.end - row);
      const bool two = height > kTile;
      const WideX x = {a.x + row / kTile * a.tile + g * 1024, a.tile, 1024};
      uint32_t* sums = a.sums + pair * 1024;
      const uint32_t* before = block ? sums : nullptr;
      if (pair == 0)
        (two ? expand_and_add<kPlain, true> : expand_and_add<kPlain, false>)(x, held, g, depth, a.expanded, mask,
                                                                             before);
      else
        (two ? add_expanded<kSecond, true> : add_expanded<kSecond, false>)(x, depth, a.expanded, before);
      two ? store_sums<true>(sums) : store_sums<false>(sums);
      if (block + 1 == blocks) done(row, height, sums);
    }
  }
}

template <class Done>
void wide_panel(const WideTask& a, const Done& done) {
  switch (plain_format(a.w.format)) {
    case liushui::kInt4: return wide_panel_of<liushui::kInt4>(a, done);
    case liushui::kInt4Min: return wide_panel_of<liushui::kInt4Min>(a, done);
    case liushui::kInt4K: return wide_panel_of<liushui::kInt4K>(a, done);
    case liushui::kInt6K: return wide_panel_of<liushui::kInt6K>(a, done);
    default: return wide_panel_of<liushui::kInt8>(a, done);
  }
}

constexpr long kWideExpanded = kWideDepth * kWideChunk, kWideSums = kWideRows * kWide * 4, kWideY = 2 * kTile * kWide * 4;

// Calls each(panel, first row, row after the last) for the share of `worker`, tiles being set up for w.
template <class Each>
void wide_units(const PackedWeight& w, long panels, long rows, int worker, int workers, const Each& each) {
  const long row_blocks = (rows + kWideRows - 1) / kWideRows;
  const Share share = share_of(panels * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  const bool second = weight_second(plain_format(w.format));
  configure_wide((int)(second ? min_of(rows, kTile) : kTile), second);
  for (long unit = share.begin; unit < share.end; unit++) {
    const long begin = unit % row_blocks * kWideRows;
    each(unit / row_blocks, begin, min_of(rows, begin + kWideRows));
  }
  LS_TILE_RELEASE();
}

// x: as prepared for `stacked`, of which w is a part.
inline void wide_multiply(const PackedWeight& stacked, const PackedWeight& w, const void* x, long rows,
                          long first_column, const Output& out, int worker, int workers) {
  const WideForms forms(stacked);
  const char* first = (const char*)x + forms.first(w) * (long)sizeof(bf16);
  const long tile = forms.tile() * (long)sizeof(bf16);
  const bool turn = !weight_second(plain_format(w.format));
  char* expanded = (char*)liushui::scratch(liushui::kProduct, kWideExpanded + kWideSums + kWideY);
  uint32_t* first_sums = (uint32_t*)(expanded + kWideExpanded);
  float* turned = (float*)(expanded + kWideExpanded + kWideSums);
  wide_units(w, (w.n + kWide - 1) / kWide, rows, worker, workers, [&](long panel, long begin, long end) {
    const long column = panel * kWide, count = min_of(kWide, w.n - column);
    wide_panel({w, first, tile, begin, end, panel, expanded, first_sums}, [&](long row, long height, uint32_t* sums) {
      place_sums(sums, height > kTile, turn, turned);
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, turned, kWide);
    });
  });
}

}  // namespace
#endif
