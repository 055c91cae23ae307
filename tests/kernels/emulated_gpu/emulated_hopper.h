// Stands in for src/liushui/kernels/cuda/hopper.cuh on a CPU. Copies and products are done when they are asked for.
#pragma once
#define LIUSHUI_HOPPER
#include "emulation.h"
#include "exact.cuh"

static const u32 CLUSTER = DOWN;
static inline u32 cluster_rank() { return self->block % CLUSTER; }
static inline u32 cluster_index() { return self->block / CLUSTER; }
static inline u32 cluster_count() { return static_cast<u32>(blocks.size()) / CLUSTER; }
static inline Meeting& meeting(u32 number) { return block().meetings[number]; }
static inline void report(u32 number, u32 threads) {
  Meeting& m = meeting(number);
  progress++;
  if (++m.arrived == threads) m.arrived = 0, m.round++;
}
static inline void meet(u32 number, u32 threads) {
  const u64 round = meeting(number).round;
  report(number, threads);
  wait_until([&] { return meeting(number).round != round; });
}
static inline void cluster_meet() {
  const u32 here = self->block;
  const auto first = [&]() -> Meeting& { self->block = here - here % CLUSTER; Meeting& m = meeting(15); self->block = here; return m; };
  const u64 round = first().round;
  progress++;
  if (++first().arrived == CLUSTER * block().warps.size() * 32) first().arrived = 0, first().round++;
  else wait_until([&] { return first().round != round; });
}
template <class Do> static inline void in_block(u32 rank, Do act) {
  const u32 here = self->block;
  self->block = here - here % CLUSTER + rank;
  act();
  self->block = here;
}
static inline void release_in(u32 barrier, u32 rank) {
  in_block(rank, [&] { ring_release(barrier, 1); });
}

// bfloat16 [height, columns] at `rows`; boxes of `box` rows, or, with `half`, of box / 2 of the first `half` rows and of the others,
// in groups of eight by turns. What lies outside is zero.
struct Boxes { const u16* rows; i64 columns, height, box, half; u8 more[88]; };
static_assert(sizeof(Boxes) == sizeof(TensorMap), "as large as the GPU's");
static inline void fetch_box(u32 target, const TensorMap* map, int column, i64 first, bool pairs, u32 barrier, bool many, u32 mask) {
  const Boxes& m = *reinterpret_cast<const Boxes*>(map);
  if (target % 1024 || (pairs ? m.half : 0) != m.half || m.box % 8 || m.box > 256) abort();
  for (u32 rank = 0; rank < CLUSTER; rank++) {
    if (many ? !(mask >> rank & 1) : rank != cluster_rank()) continue;
    in_block(rank, [&] {
      for (int r = 0; r < m.box; r++)
        for (int c = 0; c < 64; c++) {
          const i64 in_half = first + r / 16 * 8 + r % 8, row = pairs ? in_half + r / 8 % 2 * m.half : first + r;
          const bool inside = column + c < m.columns && row < m.height && (!pairs || in_half < m.half);
          const u32 place = target + r * 128 + c * 2;
          const u16 x = inside ? m.rows[row * m.columns + column + c] : 0;
          memcpy(shared_memory() + (place ^ (place >> 7 & 7) << 4), &x, 2);
        }
      barrier_at(barrier).bytes -= static_cast<int>(m.box) * 128;
      settle(barrier_at(barrier));
    });
  }
}
template <bool MANY> static inline void fetch_2d(u32 target, const TensorMap* map, int column, int row, u32 barrier, u32 mask) {
  fetch_box(target, map, column, row, false, barrier, MANY, mask);
}
template <bool MANY> static inline void fetch_pairs(u32 target, const TensorMap* map, int column, int group, u32 barrier, u32 mask) {
  fetch_box(target, map, column, group * 8, true, barrier, MANY, mask);
}

template <int COUNT> static inline void take_registers() {}
template <int COUNT> static inline void give_registers() {}
template <int PENDING> static inline void products_wait() {}
static inline u64 tile_at(u32 address) { return address >> 4; }
static inline float element(u64 tile, int row, int k) {
  const u32 place = static_cast<u32>(tile << 4) + row * 128 + k * 2;
  return __uint_as_float(static_cast<u32>(read<u16>(shared_memory() + (place ^ (place >> 7 & 7) << 4))) << 16);
}
static inline void multiply_tiles(float (&d)[BN / 2], u64 a, u64 b, u32 keep) {
  const int lane = self->thread % 32, first = self->thread / 32 % 4 * 16 + lane / 4;
  for (int i = 0; i < BN / 2; i++) {
    float sum = keep ? d[i] : 0.0f;
    for (int k = 0; k < 16; k++) sum += element(a, first + i / 2 % 2 * 8, k) * element(b, i / 4 * 8 + lane % 4 * 2 + i % 2, k);
    d[i] = sum;
  }
}
template <int COUNT> static inline void settle(float (&)[COUNT]) {}

// bfloat16 [third, second, columns] at `values`; boxes of 64 columns.
struct Boxes3 { const u16* values; i64 columns, second, third, wide, deep; u8 more[80]; };
static_assert(sizeof(Boxes3) == sizeof(TensorMap), "as large as the GPU's");
static inline void fetch_3d(u32 target, const TensorMap* map, int column, int second, int third, u32 barrier) {
  const Boxes3& m = *reinterpret_cast<const Boxes3*>(map);
  if (target % 1024 || column % 64 || column >= m.columns) abort();
  for (int i = 0; i < m.deep * m.wide * 64; i++) {
    const i64 c = i % 64, s = second + i / 64 % m.wide, t = third + i / 64 / m.wide;
    const u32 place = target + i * 2;
    const u16 x = s < m.second && t < m.third ? m.values[(t * m.second + s) * m.columns + column + c] : 0;
    memcpy(shared_memory() + (place ^ (place >> 7 & 7) << 4), &x, 2);
  }
  barrier_at(barrier).bytes -= static_cast<int>(m.deep * m.wide * 128);
  settle(barrier_at(barrier));
}
static inline u64 columns_at(u32 address, u32 apart) { return tile_at(address) | static_cast<u64>(apart >> 4) << 32; }
// `a`: the words of a warp's lanes; all have handed them in.
template <int N, bool BY_COLUMNS> static inline void multiply_words(float* d, const u32 (&a)[4], u64 b, u32 keep) {
  static u32 words[1024][32][4];
  const u32 lane = self->thread % 32, warp = self->block * 16 + self->thread / 32;
  memcpy(words[warp][lane], a, 16);
  __syncwarp();
  for (u32 i = 0; i < N / 2; i++) {
    float sum = keep ? d[i] : 0.0f;
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 word = words[warp][lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2 % 2];
      const u64 box = (b & 0xFFFFFFFF) + column / 64 * (b >> 32);
      sum += __uint_as_float(k % 2 ? word & 0xFFFF0000u : word << 16) * (BY_COLUMNS ? element(box, k, column % 64) : element(b, column, k));
    }
    d[i] = sum;
  }
  __syncwarp();
}
template <int BY_COLUMNS> static inline void multiply_64(float (&d)[32], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) {
  multiply_words<64, BY_COLUMNS>(d, {a, b, c, e}, tile, keep);
}
template <int BY_COLUMNS> static inline void multiply_128(float (&d)[64], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) {
  multiply_words<128, BY_COLUMNS>(d, {a, b, c, e}, tile, keep);
}
#define MULTIPLY_REGISTERS(N, PARTS_, A, B, KEEP)                                                                             \
  template <int BY_COLUMNS> static inline void multiply_##N(float (&d)[N / 2], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) { \
    multiply_words<N, BY_COLUMNS>(d, {a, b, c, e}, tile, keep);                                                                \
  }
static inline void multiply_8(float (&d)[4], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) {
  multiply_words<8, false>(d, {a, b, c, e}, tile, keep);
}
static inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  const u32 words[5] = {address, a, b, c, d};
  together(words, 5, [](u32(*in)[12], u32(*)[4]) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) memcpy(shared_memory() + in[i * 8 + lane / 4][0] + lane % 4 * 4, &in[lane][1 + i], 4);
  });
}
static inline u32 rounded(float low, float high) { return narrow(low) | static_cast<u32>(narrow(high)) << 16; }
static inline uint4 shared128(u32 address) { return read<uint4>(shared_memory() + address); }
static inline i64 clock64() { yield(); return 0; }
static inline void give_up() { abort(); }
static inline void fault() { abort(); }
static inline bool warp_any(bool x) { return warp_max(x) != 0; }
static inline void await_kernels_before() {}
static inline void let_next_kernel_start() {}
