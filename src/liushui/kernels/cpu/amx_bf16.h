// y = x w^T in bfloat16 with tiles. The weight lies in panels of 32 columns, [panel][k / 32][column / 16][k / 2 % 16]
// [column % 16][k % 2]: a step of K is two tiles of 1 KiB, the next step follows. Every element of y is one tile's
// element that takes K in steps of 32, in order (put aside and taken up again between blocks of K, which changes
// nothing), whatever the tile's height: one row and 512 give the same bits.
//
// A tile is loaded in 8 cycles from the nearest cache and in about 70 from the second (measured on Sapphire Rapids,
// where four products take 64), so all that is multiplied is brought near by prefetching: a block of the panel stays
// there while pairs of tiles of x pass.
#pragma once
#include "amx.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr long kTileBytes = 1024, kPairBytes = 2 * kTileBytes;
constexpr long kPairColumns = 32, kPairRows = 32;  // of two tiles
constexpr long kSumBytes = kPairColumns * sizeof(float), kSumLines = 8;  // of a row of sums; fetched in a turn
constexpr long kBlockChunks = 9;                   // steps of K for which panel and rows share the nearest cache
constexpr long kBlockPairs = 16;                   // pairs of tiles of rows whose sums wait for the next block of K
constexpr long kTurnsAhead = 2, kStreamAhead = 4;  // how early x, and a panel's first reading, are fetched

inline long bf16_chunks(long k) { return (k + kInnerGroup - 1) / kInnerGroup; }
inline long bf16_panels(long n) { return (n + kPairColumns - 1) / kPairColumns; }

// Rows as they are (in any tile height), or [pair of tiles][chunk][tile][row][32] with zeros past k.
inline bool bf16_direct(long k, int x_type, long rows) {
  return x_type == liushui::kBFloat16 && k % kInnerGroup == 0 && rows <= kTile;
}

inline size_t bf16_prepared_bytes(long k, int x_type, long rows) {
  return bf16_direct(k, x_type, rows) ? 0 : (size_t)((rows + kPairRows - 1) / kPairRows * bf16_chunks(k) * kPairBytes);
}

// Where the 32 values of a row begin, chunk 0.
inline bf16* bf16_place(bf16* prepared, long k, long row) {
  const long tile = row / kPairRows * bf16_chunks(k) * 2 + row / kTile % 2;
  return prepared + (tile * kTile + row % kTile) * kInnerGroup;
}

template <class T>
void bf16_rows(long k, const T* x, long begin, long end, bf16* prepared) {
  constexpr bool kSame = sizeof(T) == sizeof(bf16);
  for (long row = begin; row < end; row++) {
    bf16* to = bf16_place(prepared, k, row);
    for (long at = 0; at < k; at += kInnerGroup, to += kPairBytes / 2) {
      const T* from = x + (row - begin) * k + at;
      if (kSame && k - at >= kInnerGroup) {
        memcpy((void*)to, from, kInnerGroup * sizeof(bf16));
        continue;
      }
      for (long i = 0; i < kInnerGroup; i += W) {
        const long left = k - at - i;
        store(to + i, left > 0 ? load_up_to(from + i, left) : vf{});
      }
    }
  }
}

// Panel 0 of the `width` rows at `weight`.
inline void bf16_pack_panel(const bf16* weight, long width, long k, bf16* to) {
  memset((void*)to, 0, (size_t)(bf16_chunks(k) * kPairBytes));
  for (long c = 0; c < width; c++)
    for (long i = 0; i < k; i++)
      to[i / 32 * 1024 + c / 16 * 512 + i % 32 / 2 * 32 + c % 16 * 2 + i % 2] = weight[c * k + i];
}

inline void bf16_embed(const PackedWeight& w, long row, float* out) {
  const bf16* from = (const bf16*)w.data + row / 32 * bf16_chunks(w.k) * 1024 + row / 16 % 2 * 512 + row % 16 * 2;
  for (long i = 0; i < w.k; i++) out[i] = widen(from[i / 32 * 1024 + i % 32 / 2 * 32 + i % 2]);
}

// Chunks of a panel of w, one after the other, and memory worth fetching while they are multiplied.
struct WeightPanel {
  const char *first, *ahead;
  long ahead_bytes;
};

// A pair of tiles of rows (or one): where it begins, how far rows, tiles and chunks lie apart; the pair after it begins
// `jump` bytes past the last chunk.
struct TileRows {
  const char* first;
  long row_bytes, tile_bytes, chunk_bytes, jump;
};

template <int kLines>
LS_INLINE void fetch_near(const void* p) {
#pragma GCC unroll 32
  for (int i = 0; i < kLines; i++) __builtin_prefetch((const char*)p + i * 64, 0, 3);
}

template <bool two>
LS_INLINE void bf16_begin(const float* y, bool first) {
  if (first) {
    LS_TILE_ZERO(0);
    LS_TILE_ZERO(1);
    if (!two) return;
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
  } else {
    LS_TILE_LOAD(0, y, kSumBytes);
    LS_TILE_LOAD(1, y + kTile, kSumBytes);
    if (!two) return;
    LS_TILE_LOAD(2, y + kTile * kPairColumns, kSumBytes);
    LS_TILE_LOAD(3, y + kTile * kPairColumns + kTile, kSumBytes);
  }
}

// A block of a panel: whether it is to be fetched (it is not near yet), and how many bytes past its last chunk what
// comes next begins; `lines` lines of memory from `ahead` on are brought to the second cache in each turn.
struct Reading {
  bool fetch;
  long jump;
  const char* ahead;
  long lines;
};

// Sums y [32][32] of a pair of tiles of rows, or of one, with chunks of a panel: begun, or taken up again.
template <bool two, bool fetch>
LS_INLINE void bf16_turns(const TileRows& x, const char* w, long chunks, bool first, const Reading& r, const float* y) {
  const char *at = x.first, *sums = (const char*)(y + kPairRows * kPairColumns), *ahead = r.ahead;
  for (long i = 0; i < chunks; i++, at += x.chunk_bytes, w += kPairBytes, sums += kSumLines * 64) {
    const char* next = at + kTurnsAhead * x.chunk_bytes + (i + kTurnsAhead < chunks ? 0 : x.jump);
    const char* next_w = w + kStreamAhead * kPairBytes + (i + kStreamAhead < chunks ? 0 : r.jump);
    LS_TILE_LOAD(6, w, 64);
    LS_TILE_LOAD(4, at, x.row_bytes);
    if (two) fetch_near<16>(next);
    LS_TILE_BF16(0, 4, 6);
    LS_TILE_LOAD(7, w + kTileBytes, 64);
    if (fetch) fetch_near<16>(next_w);
    LS_TILE_BF16(1, 4, 7);
    if (two) {
      LS_TILE_LOAD(5, at + x.tile_bytes, x.row_bytes);
      fetch_near<16>(next + kTileBytes);
      LS_TILE_BF16(2, 5, 6);
      if (!first) fetch_near<kSumLines>(sums);
    }
    if (fetch) fetch_near<16>(next_w + kTileBytes);
    for (long l = 0; l < r.lines; l++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    if (two) LS_TILE_BF16(3, 5, 7);
  }
}

template <bool two>
inline void bf16_block(const TileRows& x, const char* w, long chunks, bool first, const Reading& r, float* y) {
  bf16_begin<two>(y, first);
  if (r.fetch)
    bf16_turns<two, true>(x, w, chunks, first, r, y);
  else
    bf16_turns<two, false>(x, w, chunks, first, r, y);
  LS_TILE_STORE(0, y, kSumBytes);
  LS_TILE_STORE(1, y + kTile, kSumBytes);
  if (two) {
    LS_TILE_STORE(2, y + kTile * kPairColumns, kSumBytes);
    LS_TILE_STORE(3, y + kTile * kPairColumns + kTile, kSumBytes);
  }
}

// Rows of x for the tiles: as they are, or prepared.
struct TileInput {
  const char* data;
  bool direct;
  long rows, k;

  long chunks() const { return bf16_chunks(k); }
  long pairs() const { return (rows + kPairRows - 1) / kPairRows; }
  // Pair `pair` of tiles from `chunk` on, in blocks of `depth` chunks.
  TileRows tiles(long pair, long chunk, long depth) const {
    if (direct) return {data, k * 2, 0, 64, 0};
    return {data + (pair * chunks() + chunk) * kPairBytes, 64, kTileBytes, kPairBytes, (chunks() - depth) * kPairBytes};
  }
};

// One panel for pairs [begin, end) of tiles of rows: calls done(row, height, y [32][32]) for each pair as it is done.
// `panel_of(panel, chunk, depth)` makes these chunks of the panel, [chunk][tile], ready; they stay so until its next
// call.
template <class PanelOf, class Done>
void tile_panel(const TileInput& x, long begin, long end, long panel, const PanelOf& panel_of, float* sums,
                const Done& done) {
  const long chunks = x.chunks(), blocks = x.pairs() > 1 ? (chunks + kBlockChunks - 1) / kBlockChunks : 1;
  for (long block = 0; block < blocks; block++) {
    const long chunk = chunks * block / blocks, depth = chunks * (block + 1) / blocks - chunk;
    const WeightPanel p = panel_of(panel, chunk, depth);
    const long turns = max_of(1, (end - begin - 1) * depth), lines = (p.ahead_bytes / 64 + turns - 1) / turns;
    for (long pair = begin; pair < end; pair++) {
      float* y = sums + (pair - begin) * kPairRows * kPairColumns;
      const TileRows tiles = x.tiles(pair, chunk, depth);
      const long row = pair * kPairRows, height = min_of(kPairRows, x.rows - row);
      Reading r = {blocks == 1 || pair == begin, pair + 1 < end ? -depth * kPairBytes : 0, nullptr, 0};
      if (pair > begin) r.ahead = p.ahead + (pair - begin - 1) * depth * lines * 64, r.lines = lines;
      (height > kTile ? bf16_block<true> : bf16_block<false>)(tiles, p.first, depth, block == 0, r, y);
      if (block + 1 == blocks) done(row, height, y);
    }
  }
}

// Calls each(first panel, first pair of tiles, pair after the last) for the share of `worker` in `panels` panels, tiles
// being set up for x.
template <class Each>
void tile_units(const TileInput& x, long panels, int worker, int workers, const Each& each) {
  const long row_blocks = (x.pairs() + kBlockPairs - 1) / kBlockPairs;
  const Share share = share_of(panels * row_blocks, worker, workers);
  if (share.begin == share.end) return;
  configure_tiles(x.direct ? (int)x.rows : kTile, kTile, 64);  // prepared rows are whole tiles
  for (long unit = share.begin; unit < share.end; unit++) {
    const long begin = unit % row_blocks * kBlockPairs;
    each(unit / row_blocks, begin, min_of(x.pairs(), begin + kBlockPairs));
  }
  LS_TILE_RELEASE();
}

// The share of `worker` in y, with panels as in tile_panel.
template <class PanelOf>
void tile_multiply(const PackedWeight& w, const void* x, bool direct, long rows, long first_column, const Output& out,
                   int worker, int workers, const PanelOf& panel_of) {
  const TileInput input = {(const char*)x, direct, rows, w.k};
  float* sums = (float*)liushui::scratch(liushui::kProduct, kBlockPairs * kPairRows * kSumBytes);
  tile_units(input, bf16_panels(w.n), worker, workers, [&](long panel, long begin, long end) {
    const long column = panel * kPairColumns, count = min_of(kPairColumns, w.n - column);
    tile_panel(input, begin, end, panel, panel_of, sums, [&](long row, long height, const float* y) {
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, y,
                kPairColumns);
    });
  });
}

// Panels of a weight that lies packed.
struct PackedPanels {
  const PackedWeight& w;

  WeightPanel operator()(long panel, long chunk, long depth) const {
    const char* first = (const char*)w.data + (panel * bf16_chunks(w.k) + chunk) * kPairBytes;
    return {first, first + depth * kPairBytes, depth * kPairBytes};
  }
};

inline void bf16_multiply(const PackedWeight& w, const void* x, int x_type, long rows, long first_column,
                          const Output& out, int worker, int workers) {
  tile_multiply(w, x, bf16_direct(w.k, x_type, rows), rows, first_column, out, worker, workers, PackedPanels{w});
}

}  // namespace
#endif
