// What the decoder's parts share: sizes, parameters, mail, shared memory.
#pragma once
#include "exact.cuh"

#ifndef TRACE
#define TRACE 0
#endif

constexpr int WARPS = 8, THREADS = WARPS * 32;  // of those that compute; one more warp streams
constexpr int PIECE = 512;                      // columns of a weight tile in a slot of the ring
constexpr int TILE_BYTES = 8 * PIECE * 2;       // boxes of 64 columns and 8 rows
constexpr int GROUP = HEADS / KV_HEADS, QUERY = HEADS * DIM, QKV = (HEADS + 2 * KV_HEADS) * DIM;
constexpr int SPAN = 512, UNIT = 32;            // keys in a split of attention, and in a slot; two units are a tile
constexpr int KEY_BYTES = DIM * 2;
constexpr int BOX = BLOCK < UNIT ? BLOCK : UNIT;
constexpr int SLOT_BYTES = TILE_BYTES;
constexpr int WIDEST = (INNER > QUERY ? INNER : QUERY) > HIDDEN ? (INNER > QUERY ? INNER : QUERY) : HIDDEN;
constexpr int HALF = DIM / 2;
#define MINUS_INFINITY __int_as_float(0xFF800000)
static_assert(HIDDEN % PIECE == 0 && INNER % PIECE == 0 && QUERY % PIECE == 0, "rows are cut in whole pieces");
constexpr int MOST_TILES = SLOTS >= 23 ? 8 : (SLOTS + 1) / 3 / 2 * 2;  // in use, as many awaited, all but one left out
static_assert(MOST_TILES >= 4, "shared memory is too small");
static_assert(QKV % 8 == 0 && GROUP <= 8 && (DIM == 64 || DIM == 128) && ROWS <= 8 && BLOCK >= 16, "shape");
static_assert(UNIT * KEY_BYTES <= SLOT_BYTES && SLOT_BYTES % 1024 == 0, "swizzled by address bits");

struct Layer {
  const TensorMap *qkv, *output, *gate_up, *down; // [QKV, HIDDEN], [HIDDEN, QUERY], [2 INNER, HIDDEN], [HIDDEN, INNER]
  const u16 *input_norm, *mlp_norm, *q_norm, *k_norm;
  const float* rope;                              // [positions, DIM]: cosines, then sines
  u16 *keys, *values;                             // [blocks, KV_HEADS, BLOCK, DIM]
};

struct Step {
  TensorMap keys, values;                         // of all layers' caches, as rows of DIM
  const Layer* layers;
  u16* stream;                                    // [rows, HIDDEN], in and out
  u64* mail;                                      // zeros before the first launch
  const int *positions, *slots, *lengths, *table; // [rows], [rows], [rows], [rows, width]
  u32* counter;                                   // [3]: of the barriers, launches so far, blocks that are done
  int width, splits, cache_rows, rows;            // blocks of a table's row; most splits; rows of a layer's cache; sequences
  float eps, scale;                               // scale: of the logits, times log2(e)
};

DEVICE int live(const Step& step) { return ROWS == 1 ? 1 : step.rows; }

// What the parts of a layer leave for one another: words, each with a tag. Two sets, used by turns.
struct Mail {
  static constexpr i64 STREAM = ROWS * HIDDEN / 2, SET = 2 * STREAM + ROWS * (QKV + QUERY + INNER) / 2;
  static constexpr int PART = GROUP * (DIM + 2);  // of a split: for each head maximum, norm, weighted values
  u64 *middle, *out, *qkv, *mixed, *inner, *parts;
  DEVICE Mail(const Step& step, int layer) {
    u64* set = step.mail + layer % 2 * (SET + (i64)ROWS * KV_HEADS * step.splits * PART);
    middle = set, out = set + STREAM, qkv = set + 2 * STREAM, mixed = qkv + ROWS * QKV / 2;
    inner = mixed + ROWS * QUERY / 2, parts = set + SET;
  }
};

// Attention's workspace, and the inputs of products, share shared memory.
struct Attention {
  u16 query[8][DIM + 8];
  u16 key[DIM], value[DIM];
  u16 weights[8][SPAN + 8];
  float tops[SPAN / UNIT][8], alphas[SPAN / UNIT / 2][8];  // of units, of tiles
};
constexpr int INPUT_BYTES = ROWS * WIDEST * 2 + 256;  // wgmma reads what lies behind, for tokens that nobody asks for
constexpr int WORK_BYTES = INPUT_BYTES > (int)sizeof(Attention) ? INPUT_BYTES : (int)sizeof(Attention);

struct Shared {
  u8 ring[SLOTS][SLOT_BYTES];
  u8 work[(WORK_BYTES + 15) / 16 * 16];
  u64 full[SLOTS], empty[SLOTS];
  i64 sums[WARPS][ROWS];
  u32 tops[WARPS][ROWS];
  uint4 zero;
  u32 waiting;  // for mail: copies should not hold it up
  Layer layers[LAYERS];
};
constexpr int SHARED_BYTES = 232448;  // of a Hopper: all of it, as wgmma may read what lies behind the ring
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory of a Hopper");

// Clock readings of one layer, by the first thread of each block.
#if TRACE
__device__ long long trace[128 * 16];
#endif
struct Trace {
  bool on;
  DEVICE void mark(int n) const {
#if TRACE
    if (on && threadIdx.x == 0 && blockIdx.x < 128) trace[blockIdx.x * 16 + n] = clock64();
#endif
  }
};

DEVICE int share(int tiles) { return (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x; }
DEVICE void sync() { meet_in_block(THREADS); }

