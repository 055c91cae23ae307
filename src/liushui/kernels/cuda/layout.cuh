// What the decoder's parts share: sizes, parameters, mail, shared memory.
#pragma once
#include "exact.cuh"

#ifndef TRACE
#define TRACE 0
#endif

constexpr int WARPS = 8, THREADS = WARPS * 32;  // of those that compute; one more warp streams
constexpr int PIECE = 512;                      // columns of a weight tile in a slot of the ring
constexpr int ROW_BYTES = PIECE * 2 + 16;       // padded, so that 8 rows lie in different banks
constexpr int GROUP = HEADS / KV_HEADS, QUERY = HEADS * DIM, QKV = (HEADS + 2 * KV_HEADS) * DIM;
constexpr int SPAN = 512, UNIT = 32;            // keys in a split of attention, and in a slot; two units are a tile
constexpr int KEY_BYTES = DIM * 2;
constexpr int BOX = BLOCK < UNIT ? BLOCK : UNIT;
constexpr int SLOT_BYTES = UNIT * KEY_BYTES > 8 * ROW_BYTES ? UNIT * KEY_BYTES : 8 * ROW_BYTES;
constexpr int WIDEST = (INNER > QUERY ? INNER : QUERY) > HIDDEN ? (INNER > QUERY ? INNER : QUERY) : HIDDEN;
constexpr int HALF = DIM / 2;
#define MINUS_INFINITY __int_as_float(0xFF800000)
static_assert(HIDDEN % PIECE == 0 && INNER % PIECE == 0 && QUERY % PIECE == 0, "rows are cut in whole pieces");
static_assert(SLOTS >= 2 * WARPS + 2, "a warp awaits its next two tiles while it holds two, with those of seven others between");
static_assert(QKV % 8 == 0 && GROUP <= 8 && (DIM == 64 || DIM == 128) && ROWS <= 8 && BLOCK >= 16, "shape");
static_assert(SLOT_BYTES % 128 == 0, "a box starts at a multiple of 128 bytes");

struct Layer {
  const u16 *qkv, *output, *gate_up, *down;       // [QKV, HIDDEN], [HIDDEN, QUERY], [2 INNER, HIDDEN], [HIDDEN, INNER]
  const u16 *input_norm, *mlp_norm, *q_norm, *k_norm;
  const float* rope;                              // [positions, DIM]: cosines, then sines
  u16 *keys, *values;                             // [blocks, KV_HEADS, BLOCK, DIM]
};

struct Step {
  TensorMap keys, values;                         // of all layers' caches, as rows of DIM
  const Layer* layers;
  u16* stream;                                    // [ROWS, HIDDEN], in and out
  u64* mail;                                      // zeros before the first launch
  const int *positions, *slots, *lengths, *table; // [ROWS], [ROWS], [ROWS], [ROWS, width]
  u32* counter;                                   // [3]: of the barriers, launches so far, blocks that are done
  int width, splits, cache_rows;                  // blocks of a table's row; most splits; rows of a layer's cache
  float eps, scale;                               // scale: of the logits, times log2(e)
};

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
constexpr int INPUT_BYTES = ROWS * (WIDEST + 8) * 2 + 128;
constexpr int WORK_BYTES = INPUT_BYTES > (int)sizeof(Attention) ? INPUT_BYTES : (int)sizeof(Attention);

struct Shared {
  u8 ring[SLOTS][SLOT_BYTES];
  u8 work[(WORK_BYTES + 15) / 16 * 16];
  u64 full[SLOTS], empty[SLOTS];
  i64 sums[WARPS][ROWS];
  u32 tops[WARPS][ROWS];
  uint4 zero;
  Layer layers[LAYERS];
};
static_assert(sizeof(Shared) <= 232448, "shared memory of a Hopper");

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

