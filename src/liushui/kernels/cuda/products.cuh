// A layer's products and what comes before them: mail, RMS norm.
#pragma once
#include "ring.cuh"

// Where a product's input lies in `work`: column c of row r.
DEVICE int input_at(int r, int c) { return (c / 8 * ROWS + r) * 16 + c % 8 * 2; }
// Whether the block waits for mail: the streaming warp then holds back.
DEVICE void waits(Shared& s, bool yes) {
  if (threadIdx.x == 0) *static_cast<volatile u32*>(&s.waiting) = yes;
}
// The input is written.
DEVICE void input_ready(Shared& s) {
  waits(s, false);
  fence_async();
  sync();
}

// PARTS tiles of 8 weight rows, of ROWS_ALL in each part, against all rows of the input. One group of four warps
// multiplies: 64 weight rows at once.
template <int PARTS, int ROWS_ALL, int COLUMNS> struct Product {
  static constexpr int MOST = MOST_TILES / PARTS, PIECES = COLUMNS / PIECE, STEPS = PIECE / 16, EARLY = 12, KINDS = 2 / PARTS;
  Shared& s;
  const int units, warp;

  DEVICE explicit Product(Shared& s) : s(s), units(share(ROWS_ALL / 8)), warp(warp_index()) {}
  DEVICE int tiles(int first) const { return min(MOST, units - first) * PARTS; }
  // The places of a group's tiles of a piece, side by side; `passes`: those left out before them are passed on.
  DEVICE Place group(Place at, int tiles, bool passes) const {
    if (fits(at.slot, tiles)) return at;
    const int left = SLOTS - (int)at.slot;
    if (passes) {
      await_slots(s, at, left);
      release_slots(s, at, left, WARPS);
    }
    return {0, at.round + 1};
  }
  // Whether there is room for all pieces of a group, with eight places left out: they are awaited at once.
  DEVICE static bool whole(int tiles) { return tiles * PIECES <= min(32, SLOTS - 8); }

  // The weights of the first group, before the input is there.
  DEVICE void await(Place at) const {
    if (warp >= 4 || units == 0 || !whole(tiles(0))) return;
    const int many = tiles(0), lane = threadIdx.x % 32;
    Place mine = at;
#pragma unroll 1
    for (int piece = 0; piece < PIECES; piece++) {
      at = group(at, many, false);
      if (lane / many == piece) mine = at.on(lane % many);
      at = at.on(many);
    }
    if (lane < many * PIECES) spin([&] { return arrived(s, mine); }, 3, mine.slot);
    __syncwarp();
  }
  // Steps FROM to TO of a piece.
  template <int FROM, int TO> DEVICE static void steps(float (&c)[4], u32 a, u32 apart, u32 b) {
    chain_begin();
#pragma unroll
    for (int i = FROM; i < TO; i++) chain_step(c, a + i / 4 * 64 + i % 4 * 2, apart, b + i * 2 * ROWS);
    chain_end();
  }
  DEVICE u32 weights(Place at) const { return chain_place<16>(shared_address(s.ring[uniform(at.slot)])); }

  // A group's sums; its tenants are awaited and released here. Returns who follows.
  DEVICE Place multiply_group(float (&c)[4], Place taken, int tiles, bool all) const {
    const u32 apart = chain_apart(tiles == 1 ? 0 : SLOT_BYTES);  // a tile alone is read eight times
    u32 x = chain_place<ROWS * 16>(shared_address(s.work));
    constexpr u32 NEXT = PIECE / 8 * ROWS;
    Place at = group(taken, tiles, warp == 0 && !all), before = at;
    if (all) {
#pragma unroll 1
      for (int piece = 0; piece < PIECES; piece++, x += NEXT) {
        if (piece > 0) at = group(at.on(tiles), tiles, false);
        steps<0, STEPS>(c, weights(at), uniform(apart), uniform(x));
      }
      chain_wait<0>(c);
      return at;
    }
    await_slots(s, at, tiles);
#pragma unroll 1
    for (int piece = 0; piece < PIECES; piece++, x += NEXT) {
      const u32 a = weights(at);
      steps<0, EARLY>(c, a, uniform(apart), uniform(x));
      chain_wait<1>(c);  // the piece before is done
      if (piece > 0) release_slots(s, before, tiles, WARPS / 4);
      before = at, at = at.on(tiles);
      if (piece + 1 < PIECES) {
        at = group(at, tiles, warp == 0);
        await_slots(s, at, tiles);
      }
      steps<EARLY, STEPS>(c, a, uniform(apart), uniform(x));
    }
    chain_wait<0>(c);
    release_slots(s, before, tiles, WARPS / 4);
    return at;
  }
  DEVICE Place pass(Place at, int tiles, bool releases) const {
#pragma unroll 1
    for (int piece = 0; piece < PIECES; piece++) {
      at = group(at, tiles, releases && warp == 0);
      if (releases) release_slots(s, at, tiles, WARPS / 4);
      at = at.on(tiles);
    }
    return at;
  }

  // `end(token, column, values)` gets each part's values of `column` and the next. `start(token, column)` is called before
  // the sum, its result handed to `end`. The first tile is tenant `taken` of the ring; returns who follows the last.
  template <class Start, class End> DEVICE Place run(Place taken, int live, Start start, End end) const {
    const int lane = threadIdx.x % 32, g = lane / 4, token = lane % 4 * 2 + g % 2;
#pragma unroll 1
    for (int first = 0; first < units; first += MOST) {
      const int last = min(first + MOST, units), many = tiles(first);
      if (warp >= 4) {
        taken = pass(taken, many, false);
        continue;
      }
      int column[KINDS];
      u32 old[KINDS];
      bool mine[KINDS];
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++) {
        const int unit = first + warp * KINDS + kind;
        column[kind] = (int)(blockIdx.x + gridDim.x * unit) * 8 + g / 2 * 2, mine[kind] = token < live && unit < last;
        old[kind] = mine[kind] ? start(token, column[kind]) : 0;
      }
      float c[4] = {};
      const bool all = first == 0 && whole(many);
      const Place next = multiply_group(c, taken, many, all);
      // A thread has tokens 2 t and 2 t + 1 of rows g and 8 + g; its neighbour of the next row takes one of them.
      float values[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float given = __shfl_xor_sync(0xFFFFFFFFu, g % 2 ? c[2 * i] : c[2 * i + 1], 4);
        values[i][0] = g % 2 ? given : c[2 * i], values[i][1] = g % 2 ? c[2 * i + 1] : given;
      }
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++)
        if (mine[kind]) {
          float own[PARTS][2];
#pragma unroll
          for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int j = 0; j < 2; j++) own[part][j] = values[kind + part][j];
          end(token, column[kind], own, old[kind]);
        }
      taken = all ? pass(taken, many, true) : next;
    }
    return taken;
  }
};

// Both words of each packet, when they are there.
template <int COUNT> DEVICE void receive(u32 (&words)[COUNT][2], const u64* at, int stride, u32 tag) {
  spin([&] {
    bool there = true;
    u64 raw[COUNT][2];
#pragma unroll
    for (int i = 0; i < COUNT; i++) look(raw[i], at + (i64)i * stride);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        words[i][j] = static_cast<u32>(raw[i][j]);
        there &= static_cast<u32>(raw[i][j] >> 32) == tag;
      }
    if (!there) rest();
    return there;
  }, 5, tag);
}

// The input of a product: rows as they are.
template <int COLUMNS> DEVICE void take(Shared& s, const u64* mail, u32 tag, int live) {
  constexpr int PACKETS = COLUMNS / 4, COUNT = PACKETS / THREADS;
  waits(s, true);
  static_assert(PACKETS % (THREADS / 2) == 0, "columns");
  const int thread = threadIdx.x;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r >= live) break;
    if (COUNT > 0) {
      u32 words[COUNT > 0 ? COUNT : 1][2];
      receive(words, mail + ((i64)r * PACKETS + thread) * 2, THREADS * 2, tag);
      if (r == 0) sync();  // the input is free: all warps are through with the last product
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        *reinterpret_cast<uint2*>(s.work + input_at(r, (thread + THREADS * i) * 4 / 8 * 8) + thread % 2 * 8) =
            make_uint2(words[i][0], words[i][1]);
    }
    if (PACKETS % THREADS) {  // half of the threads have one more
      u32 words[1][2] = {};
      if (thread < THREADS / 2) receive(words, mail + ((i64)r * PACKETS + COUNT * THREADS + thread) * 2, 0, tag);
      if (r == 0 && COUNT == 0) sync();
      if (thread < THREADS / 2)
        *reinterpret_cast<uint2*>(s.work + input_at(r, (COUNT * THREADS + thread) * 4 / 8 * 8) + thread % 2 * 8) =
            make_uint2(words[0][0], words[0][1]);
    }
  }
  input_ready(s);
}

// The input of a product: the residual stream, RMS-normed. Its weight is asked for long before.
struct Norm {
  static constexpr int PACKETS = HIDDEN / 4, COUNT = (PACKETS + THREADS - 1) / THREADS;
  u32 factors[COUNT][2];

  DEVICE static bool inside(int i) { return PACKETS % THREADS == 0 || threadIdx.x + THREADS * i < PACKETS; }
  DEVICE static int place(int i) { return inside(i) ? threadIdx.x + THREADS * i : 0; }
  DEVICE explicit Norm(const u16* weight) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const uint2 pair = constant64(weight + place(i) * 4);
      factors[i][0] = pair.x, factors[i][1] = pair.y;
    }
  }
  // From `rows` where given, else from the mail.
  DEVICE void take(Shared& s, const u16* rows, const u64* mail, u32 tag, float eps, int live, Trace trace,
                   int mark) const {
    waits(s, true);
    u32 x[ROWS][COUNT][2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= live) break;
      if (rows != nullptr) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
          for (int j = 0; j < 2; j++) x[r][i][j] = fresh32(rows + r * HIDDEN + place(i) * 4 + 2 * j);
      } else {
        static_assert(COUNT == 1 || PACKETS % THREADS == 0, "one packet a thread, or whole rounds");
        receive(x[r], mail + (i64)r * (HIDDEN / 2) + place(0) * 2, THREADS * 2, tag);
      }
    }
    trace.mark(mark);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= live) break;
      u32 top = 0;
#pragma unroll
      for (int i = 0; i < COUNT; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) top = max(top, max(magnitude(low_half(x[r][i][j])), magnitude(high_half(x[r][i][j]))));
      top = warp_max(top);
      if (lane == 0) s.tops[warp][r] = top;
    }
    sync();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= live) break;
      u32 top = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = max(top, s.tops[w][r]);
      i64 sum = 0;
#pragma unroll
      for (int i = 0; i < COUNT; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (inside(i)) sum += scaled_square(low_half(x[r][i][j]), top) + scaled_square(high_half(x[r][i][j]), top);
      sum = warp_sum(sum);
      if (lane == 0) s.sums[warp][r] = sum;
    }
    sync();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= live) break;
      u32 top = 0;
      i64 sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = max(top, s.tops[w][r]), sum += s.sums[w][r];
      const float scale = row_scale(sum, top, HIDDEN, eps);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        u32 y[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
          y[j] = pair(__fmul_rn(__fmul_rn(low_half(x[r][i][j]), scale), low_half(factors[i][j])),
                      __fmul_rn(__fmul_rn(high_half(x[r][i][j]), scale), high_half(factors[i][j])));
        if (inside(i))
          *reinterpret_cast<uint2*>(s.work + input_at(r, place(i) * 4 / 8 * 8) + threadIdx.x % 2 * 8) = make_uint2(y[0], y[1]);
      }
    }
    input_ready(s);
  }
};
