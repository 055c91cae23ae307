// y = x w^T in bfloat16, with tiles or with vectors in their place (pairs.h). The weight lies in panels of 32 columns,
// [panel][k / 32][column / 16][k / 2 % 16][column % 16][k % 2]: a step of K is two tiles of 1 KiB (for vectors row by
// row), the next step follows. Every element of y is one tile's element that takes K in steps of 32, in order, whatever
// the tile's height: one row and 512 give the same bits.
//
// What is multiplied is fetched to the nearest cache some steps before. Measured on Sapphire Rapids, two threads that
// share their cores with neighbours, 256 rows of 576 by 3,072: 1.1 TFLOP/s, 0.8 without fetching. Blocks of K that stay
// near, their sums put aside between, gain nothing over that.
#pragma once
#include "pairs.h"

#if defined(LS_BF16)
namespace {

constexpr long kTileBytes = 1024, kPairBytes = 2 * kTileBytes;
constexpr long kPairColumns = 32, kPairRows = 32;  // of two tiles
// A weight's pair of tiles: one after the other, or row by row beside each other. Vectors take a row of both at once and
// so read memory front to back, which alone is twice as fast.
#if defined(LS_TILE_BF16)
constexpr long kWeightTile = kTileBytes, kWeightRow = 64;
#else
constexpr long kWeightTile = 64, kWeightRow = 128;
#endif
constexpr long kSumBytes = kPairColumns * sizeof(float);  // of a row of sums
constexpr long kBlockPairs = 16;                   // pairs of tiles of rows that pass over a panel while it is near
constexpr long kStreamPairs = 2;                   // up to here a panel is fetched by being read, at memory's speed
constexpr long kTurnsAhead = 2, kStreamAhead = 4;  // how many steps of K early x and the weight are fetched

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

// Element i of column c of a panel.
LS_INLINE long weight_place(long i, long c) {
  return (i / 32 * kPairBytes + c / 16 * kWeightTile + i % 32 / 2 * kWeightRow) / 2 + c % 16 * 2 + i % 2;
}

// Panel 0 of the `width` rows at `weight`.
inline void bf16_pack_panel(const bf16* weight, long width, long k, bf16* to) {
  memset((void*)to, 0, (size_t)(bf16_chunks(k) * kPairBytes));
  for (long c = 0; c < width; c++)
    for (long i = 0; i < k; i++) to[weight_place(i, c)] = weight[c * k + i];
}

inline void bf16_embed(const PackedWeight& w, long row, float* out) {
  const bf16* panel = (const bf16*)w.data + row / 32 * bf16_chunks(w.k) * (kPairBytes / 2);
  for (long i = 0; i < w.k; i++) out[i] = widen(panel[weight_place(i, row % 32)]);
}

// A panel of w, and memory worth fetching while it is multiplied.
struct WeightPanel {
  const char *first, *ahead;
  long ahead_bytes;
};

// A pair of tiles of rows (or one): where it begins, how far rows, tiles and chunks lie apart.
struct TileRows {
  const char* first;
  long row_bytes, tile_bytes, chunk_bytes;
};

// What follows a panel: `jump` bytes past its last chunk the next reading begins; `lines` lines of memory from `ahead`
// on are brought to the second cache in each turn.
struct Following {
  long jump;
  const char* ahead;
  long lines;
};

#if defined(LS_TILE_BF16)
LS_INLINE void fetch_near(const char* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) __builtin_prefetch(tile + i * 64, 0, 3);
}

// Sums y [32][32] of a pair of tiles of rows, or of one, with a panel.
template <bool two>
inline void bf16_block(const TileRows& x, const char* w, long chunks, const Following& following, float* y) {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  if (two) {
    LS_TILE_ZERO(2);
    LS_TILE_ZERO(3);
  }
  const char *at = x.first, *ahead = following.ahead;
  for (long i = 0; i < chunks; i++, at += x.chunk_bytes, w += kPairBytes) {
    const char* next = at + kTurnsAhead * x.chunk_bytes;
    const char* next_w = w + kStreamAhead * kPairBytes + (i + kStreamAhead < chunks ? 0 : following.jump);
    LS_TILE_LOAD(6, w, 64);
    LS_TILE_LOAD(4, at, x.row_bytes);
    if (two) fetch_near(next);
    LS_TILE_BF16(0, 4, 6);
    LS_TILE_LOAD(7, w + kTileBytes, 64);
    fetch_near(next_w);
    LS_TILE_BF16(1, 4, 7);
    if (two) {
      LS_TILE_LOAD(5, at + x.tile_bytes, x.row_bytes);
      fetch_near(next + kTileBytes);
      LS_TILE_BF16(2, 5, 6);
    }
    fetch_near(next_w + kTileBytes);
    for (long l = 0; l < following.lines; l++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    if (two) LS_TILE_BF16(3, 5, 7);
  }
  LS_TILE_STORE(0, y, kSumBytes);
  LS_TILE_STORE(1, y + kTile, kSumBytes);
  if (two) {
    LS_TILE_STORE(2, y + kTile * kPairColumns, kSumBytes);
    LS_TILE_STORE(3, y + kTile * kPairColumns + kTile, kSumBytes);
  }
}

// Sums of one pair of tiles of rows, or of what there is of it.
inline void bf16_sums(const TileRows& x, long height, const char* w, long chunks, const Following& following, float* y) {
  (height > kTile ? bf16_block<true> : bf16_block<false>)(x, w, chunks, following, y);
}
#else
constexpr int kPairsHigh = 8;        // rows whose sums with a panel stay in registers
constexpr int kStreamHigh = 4;       // up to here the processor itself fetches fast enough
constexpr long kStreamBytes = 8192;  // how early the weight is fetched

using PairsBlock = void (*)(const PairRows&, const PairTiles&, long, float*, long);

template <int M>
void bf16_block(const PairRows& x, const PairTiles& w, long chunks, float* y, long ahead) {
  multiply_pairs<M, 2, (M > kStreamHigh)>(x, w, chunks, {y, kPairColumns, kTile}, ahead);
}

template <int M = kPairsHigh>
PairsBlock bf16_block_of(long rows) {
  if constexpr (M == 0)
    return nullptr;
  else
    return rows < M ? bf16_block_of<M - 1>(rows) : bf16_block<M>;
}

// The sums of up to a pair of tiles of rows, in blocks of nearly the same height. The first to pass over a panel fetches
// it, the last one the panel after it.
inline void bf16_sums(const TileRows& x, long height, const char* w, long chunks, const Following& following, float* y) {
  const long blocks = (height + kPairsHigh - 1) / kPairsHigh;
  for (long block = 0; block < blocks; block++) {
    const long row = height * block / blocks, end = height * (block + 1) / blocks;
    const bool first = block == 0 && !following.ahead, last = block == blocks - 1 && !following.jump;
    const long ahead = first ? kStreamBytes : last ? chunks * kPairBytes : 0;
    bf16_block_of(end - row)({x.first + row * x.row_bytes, x.row_bytes, x.chunk_bytes},
                             {w, kWeightTile, kWeightRow, kPairBytes}, chunks, y + row * kPairColumns, ahead);
  }
}
#endif

// Rows of x for the tiles: as they are, or prepared.
struct TileInput {
  const char* data;
  bool direct;
  long rows, k;

  long chunks() const { return bf16_chunks(k); }
  long pairs() const { return (rows + kPairRows - 1) / kPairRows; }
  TileRows tiles(long pair) const {
    if (direct) return {data, k * 2, 0, 64};
    return {data + pair * chunks() * kPairBytes, 64, kTileBytes, kPairBytes};
  }
};

// One panel for pairs [begin, end) of tiles of rows: calls done(row, height, y [32][32]) for each pair; y lies `apart`
// elements further on for each.
template <class Done>
void tile_panel(const TileInput& x, long begin, long end, const WeightPanel& panel, float* y, long apart,
                const Done& done) {
  const long chunks = x.chunks(), turns = max_of(1, (end - begin - 1) * chunks);
  const long lines = end - begin <= kStreamPairs ? 0 : (panel.ahead_bytes / 64 + turns - 1) / turns;
  for (long pair = begin; pair < end; pair++, y += apart) {
    const long row = pair * kPairRows, height = min_of(kPairRows, x.rows - row);
    Following following = {pair + 1 < end ? -chunks * kPairBytes : 0, nullptr, 0};
    if (pair > begin) following = {following.jump, panel.ahead + (pair - begin - 1) * chunks * lines * 64, lines};
    bf16_sums(x.tiles(pair), height, panel.first, chunks, following, y);
    done(row, height, y);
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

inline WeightPanel bf16_panel(const PackedWeight& w, long panel) {
  const long bytes = bf16_chunks(w.k) * kPairBytes;
  const char* first = (const char*)w.data + panel * bytes;
  return {first, first + bytes, bytes};
}

inline void bf16_multiply(const PackedWeight& w, const void* x, int x_type, long rows, long first_column,
                          const Output& out, int worker, int workers) {
  const TileInput input = {(const char*)x, bf16_direct(w.k, x_type, rows), rows, w.k};
  float* sums = (float*)liushui::scratch(liushui::kProduct, kPairRows * kSumBytes);
  tile_units(input, bf16_panels(w.n), worker, workers, [&](long panel, long begin, long end) {
    const long column = panel * kPairColumns, count = min_of(kPairColumns, w.n - column);
    tile_panel(input, begin, end, bf16_panel(w, panel), sums, 0, [&](long row, long height, const float* y) {
      emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, height, first_column + column, count, y,
                kPairColumns);
    });
  });
}

}  // namespace
#endif
