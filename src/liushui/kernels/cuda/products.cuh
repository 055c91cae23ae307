// A layer's products and what comes before them: mail, RMS norm.
#pragma once
#include "ring.cuh"

// Where a product's input lies in `work`: column c (a multiple of 8) of row r.
template <int COLUMNS> DEVICE int input_at(int r, int c) {
  return (r * (COLUMNS + 8) + c) * 2;
}
// PARTS tiles of 8 weight rows against all rows of the input; `end(token, column, values)` gets each part's values of
// `column` and the next. `start(token, column)` is called before the sum, its result handed to `end`. The first tile is
// tenant `taken` of the ring; returns who follows the last.
template <int PARTS, int COLUMNS, class Start, class End>
DEVICE Place product(Shared& s, Place taken, int rows, Start start, End end) {
  constexpr int PIECES = COLUMNS / PIECE;
  const int units = share(rows / 8), warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int first = 0; first < units; first += WARPS) {
    const int here = min(WARPS, units - first), column = (int)(blockIdx.x + gridDim.x * (first + warp)) * 8;
    Place at[PARTS];
    at[0] = taken.on(warp * PARTS);
    if (PARTS == 2) at[PARTS - 1] = at[0].on(1);
    taken = taken.far_on(here * PIECES * PARTS);
    if (warp >= here) continue;
    constexpr int STEPS = PIECE / 32, EARLY = 4;
    const int row = lane % 8, offset = row * ROW_BYTES + lane / 8 * 16;
    u32 x = row < ROWS ? shared_address(s.work) + input_at<COLUMNS>(row, lane / 8 * 8) : shared_address(&s.zero);
    const u32 stride = row < ROWS ? 64 : 0;
    const bool mine = g < ROWS;
    u32 old = mine ? start(g, column + 2 * t) : 0;
    float c[PARTS][4] = {};
    u32 tile[PARTS], next[PARTS] = {}, b[PARTS][4], a[4];
    load_matrices(a, x);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      tile[part] = await_slot(s, at[part]) + offset;
      load_matrices(b[part], tile[part]);
    }
#pragma unroll 1
    for (int piece = 0; piece < PIECES; piece++) {
      const bool more = piece + 1 < PIECES;
#pragma unroll
      for (int i = 0; i < STEPS; i++) {  // the next matrices are on their way while these are multiplied
        u32 v[4], w[PARTS][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          v[j] = a[j];
#pragma unroll
          for (int part = 0; part < PARTS; part++) w[part][j] = b[part][j];
        }
        x += stride;
        if (i + 1 < STEPS || more) {
          load_matrices(a, x);
#pragma unroll
          for (int part = 0; part < PARTS; part++)
            load_matrices(b[part], i + 1 < STEPS ? tile[part] + (i + 1) * 64 : next[part]);
        }
#pragma unroll
        for (int half = 0; half < 4; half += 2)
#pragma unroll
          for (int part = 0; part < PARTS; part++) multiply(c[part], v[half], v[half + 1], w[part][half], w[part][half + 1]);
        if (i == STEPS - EARLY && more) {  // in the shadow of the products
#pragma unroll
          for (int part = 0; part < PARTS; part++) next[part] = await_slot(s, at[part].on(here * PARTS)) + offset;
        }
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        release_slot(s, at[part], WARPS);
        at[part] = at[part].on(here * PARTS), tile[part] = next[part];
      }
    }
    if (mine) {
      float values[PARTS][2];
#pragma unroll
      for (int part = 0; part < PARTS; part++) values[part][0] = c[part][0], values[part][1] = c[part][1];
      end(g, column + 2 * t, values, old);
    }
  }
  return taken;
}

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
template <int COLUMNS> DEVICE void take(Shared& s, const u64* mail, u32 tag) {
  constexpr int PACKETS = COLUMNS / 4, COUNT = PACKETS / THREADS;
  static_assert(PACKETS % (THREADS / 2) == 0, "columns");
  const int thread = threadIdx.x;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (COUNT > 0) {
      u32 words[COUNT > 0 ? COUNT : 1][2];
      receive(words, mail + ((i64)r * PACKETS + thread) * 2, THREADS * 2, tag);
      if (r == 0) sync();  // the input is free: all warps are through with the last product
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        *reinterpret_cast<uint2*>(s.work + input_at<COLUMNS>(r, (thread + THREADS * i) * 4 / 8 * 8) + thread % 2 * 8) =
            make_uint2(words[i][0], words[i][1]);
    }
    if (PACKETS % THREADS) {  // half of the threads have one more
      u32 words[1][2] = {};
      if (thread < THREADS / 2) receive(words, mail + ((i64)r * PACKETS + COUNT * THREADS + thread) * 2, 0, tag);
      if (r == 0 && COUNT == 0) sync();
      if (thread < THREADS / 2)
        *reinterpret_cast<uint2*>(s.work + input_at<COLUMNS>(r, (COUNT * THREADS + thread) * 4 / 8 * 8) + thread % 2 * 8) =
            make_uint2(words[0][0], words[0][1]);
    }
  }
  sync();
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
  DEVICE void take(Shared& s, const u16* rows, const u64* mail, u32 tag, float eps, Trace trace,
                   int mark) const {
    u32 x[ROWS][COUNT][2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
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
          *reinterpret_cast<uint2*>(s.work + input_at<HIDDEN>(r, place(i) * 4 / 8 * 8) + threadIdx.x % 2 * 8) = make_uint2(y[0], y[1]);
      }
    }
    sync();
  }
};
