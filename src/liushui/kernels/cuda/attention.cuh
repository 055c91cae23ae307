// Attention of the rows, a split of one KV head at a time, with the heads' norms, the rotation and the cache.
#pragma once
#include "products.cuh"

struct Attend {
  Shared& s;
  const Step& step;
  const Layer& layer;
  const Mail& mail;
  const Item item;
  const Place taken;
  const u32 tag;
  Attention& w;
  const int warp, lane, g, t, low, last, units;

  DEVICE Attend(Shared& s, const Step& step, const Layer& layer, const Mail& mail, const Item& item, Place taken, u32 tag)
      : s(s), step(step), layer(layer), mail(mail), item(item), taken(taken), tag(tag),
        w(*reinterpret_cast<Attention*>(s.work)), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4),
        low(item.low()), last(item.length - 1), units(item.units()) {}

  // One warp: a query head or the new key, normed where it has a weight, rotated, as bfloat16 to `out`.
  DEVICE void rotate(int head, const u16* weight, u16* out) const {
    constexpr int EACH = HALF / 32;
    float x[2][EACH], factors[2][EACH], cos[EACH], sin[EACH];
    const float* angles = layer.rope + (i64)step.positions[item.row] * DIM;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      cos[e] = __uint_as_float(constant32(angles + lane * EACH + e));
      sin[e] = __uint_as_float(constant32(angles + HALF + lane * EACH + e));
#pragma unroll
      for (int h = 0; h < 2; h++) factors[h][e] = QK_NORM ? widen(constant16(weight + h * HALF + lane * EACH + e)) : 1.0f;
    }
    const u64* words = mail.qkv + ((i64)item.row * QKV + head * DIM) / 2;
    u64 raw[2];
    spin([&] {
#pragma unroll
      for (int h = 0; h < 2; h++) look(raw[h], words + (h * HALF + lane * EACH) / 2);
      return static_cast<u32>(raw[0] >> 32) == tag && static_cast<u32>(raw[1] >> 32) == tag;
    }, 6, tag);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < EACH; e++)
        x[h][e] = (lane * EACH + e) % 2 ? high_half(static_cast<u32>(raw[h])) : low_half(static_cast<u32>(raw[h]));
    if (QK_NORM) {
      u32 top = 0;
      i64 sum = 0;
#pragma unroll
      for (int e = 0; e < EACH; e++) top = max(top, max(magnitude(x[0][e]), magnitude(x[1][e])));
      top = warp_max(top);
#pragma unroll
      for (int e = 0; e < EACH; e++) sum += scaled_square(x[0][e], top) + scaled_square(x[1][e], top);
      const float scale = row_scale(warp_sum(sum), top, DIM, step.eps);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < EACH; e++) x[h][e] = __fmul_rn(__fmul_rn(x[h][e], scale), factors[h][e]);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      out[lane * EACH + e] = narrow(__fmaf_rn(x[0][e], cos[e], __fmul_rn(x[1][e], -sin[e])));
      out[HALF + lane * EACH + e] = narrow(__fmaf_rn(x[1][e], cos[e], __fmul_rn(x[0][e], sin[e])));
    }
  }

  // The query heads and the new key, rotated, and the new value; the latter two also to the cache.
  DEVICE void prepare() const {
#pragma unroll 1
    for (int r = warp; r < GROUP + 1 + 1; r += WARPS) {
      if (r <= GROUP)
        rotate(r < GROUP ? item.head * GROUP + r : HEADS + item.head, r < GROUP ? layer.q_norm : layer.k_norm,
               r < GROUP ? w.query[r] : w.key);
      else if (lane < DIM / 4) {
        u32 words[1][2];
        receive(words, mail.qkv + ((i64)item.row * QKV + (HEADS + KV_HEADS + item.head) * DIM) / 2 + lane * 2, 0, tag);
        *reinterpret_cast<uint2*>(w.value + lane * 4) = make_uint2(words[0][0], words[0][1]);
      }
    }
    for (int d = threadIdx.x; d < (8 - GROUP) * DIM / 8; d += THREADS)
      *reinterpret_cast<uint4*>(&w.query[GROUP + d / (DIM / 8)][d % (DIM / 8) * 8]) = make_uint4(0, 0, 0, 0);
    sync();
    if (item.high() == item.length && threadIdx.x < DIM / 4) {  // 16 bytes a thread, of the key and then of the value
      const int slot = step.slots[item.row], d = threadIdx.x % (DIM / 8) * 8, of = threadIdx.x / (DIM / 8);
      u16* cache = of ? layer.values : layer.keys;
      if (slot >= 0)
        *reinterpret_cast<uint4*>(cache + (((i64)(slot / BLOCK) * KV_HEADS + item.head) * BLOCK + slot % BLOCK) * DIM + d) =
            *reinterpret_cast<const uint4*>((of ? w.value : w.key) + d);
    }
  }

  // Logits of 32 keys: c [8 query heads, 32]; their maximum to `tops`. The copy engine swizzled the slot's 16-byte pieces
  // by the address bits 7 to 9. The new key, which the cache did not hold, comes from the workspace.
  DEVICE void logits(float (&c)[4][4], int unit) const {
    const int start = low + unit * UNIT;
    const Place place = taken.on(unit);
    const u32 line = await_slot(s, place) + lane % 8 * 128;
    const u32 fresh = shared_address(w.key) + lane / 8 * 16, query = shared_address(&w.query[lane % 8][lane / 8 * 8]);
    const int mine = last - start - lane % 8;  // the new key's distance
#pragma unroll
    for (int h = 0; h < DIM / 32; h++) {
      u32 a[4], k[4][4];
      load_matrices(a, query + h * 64);
      const u32 piece = h / 2 * UNIT * 128 + ((h % 2 * 4 + lane / 8 ^ lane % 8) << 4);
#pragma unroll
      for (int i = 0; i < 4; i++) load_matrices(k[i], mine == i * 8 ? fresh + h * 64 : line + i * 1024 + piece);
#pragma unroll
      for (int i = 0; i < 4; i++) multiply(c[i], a[0], a[1], k[i][0], k[i][1]);
#pragma unroll
      for (int i = 0; i < 4; i++) multiply(c[i], a[2], a[3], k[i][2], k[i][3]);
    }
    fence_async();
    release_slot(s, place, WARPS);
    float top = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (start + i * 8 + t * 2 + j > last) c[i][j] = MINUS_INFINITY;
        top = fmaxf(top, c[i][j]);
      }
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    if (t == 0) w.tops[unit][g] = __fmul_rn(top, step.scale);
  }
  // The maximum of the first `count` units, of head g.
  DEVICE float running(int count) const {
    float m = MINUS_INFINITY;
#pragma unroll
    for (int unit = 0; unit < SPAN / UNIT; unit++)
      if (unit < count) m = fmaxf(m, w.tops[unit][g]);
    return m;
  }
  // The running maximum is known for all tiles of two units: their weights side by side.
  DEVICE void weigh(const float (&c)[4][4], int unit) const {
    const int tile = unit / 2 * 2;
    const float before = running(tile), pair_top = fmaxf(w.tops[tile][g], w.tops[min(tile + 1, units - 1)][g]);
    const float m = fmaxf(before, pair_top), safe = m == MINUS_INFINITY ? 0.0f : m;
    if (t == 0 && unit == tile) w.alphas[tile / 2][g] = exp2_flushed(__fsub_rn(before, safe));
#pragma unroll
    for (int i = 0; i < 4; i++)
      *reinterpret_cast<u32*>(&w.weights[g][unit * UNIT + i * 8 + t * 2]) =
          pair(exp2_flushed(__fmaf_rn(c[i][0], step.scale, -safe)), exp2_flushed(__fmaf_rn(c[i][1], step.scale, -safe)));
  }

  // What a warp needs of one unit of values: its 16 columns, and the weights. The slot is there.
  struct Values {
    u32 p[4], v[2][4];
    float alpha;
  };
  // The new value comes from the workspace; what lies behind it may be anything, NaN too.
  DEVICE void open(Values& x, u32 line, u32 weights, int unit) const {
    u32 from[2] = {line, line + 16 * 128};
    if (low + unit * UNIT + UNIT > last) {
      const int mine = last - low - unit * UNIT - lane % 16;
#pragma unroll
      for (int k = 0; k < 2; k++)
        if (mine <= k * 16)
          from[k] = shared_address(mine < k * 16 ? static_cast<void*>(&s.zero) : w.value + warp * 16 + lane / 16 * 8);
    }
    load_matrices(x.p, weights);
#pragma unroll
    for (int k = 0; k < 2; k++) load_transposed(x.v[k], from[k]);
    x.alpha = w.alphas[unit / 2][g];
  }
  DEVICE static void mix(float (&mixed)[2][4], float (&norm)[4], const Values& x, bool begins) {
    if (begins)
#pragma unroll
      for (int i = 0; i < 2; i++) mixed[0][i] *= x.alpha, mixed[1][i] *= x.alpha, norm[i] *= x.alpha;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      multiply(mixed[0], x.p[2 * k], x.p[2 * k + 1], x.v[k][0], x.v[k][1]);
      multiply(mixed[1], x.p[2 * k], x.p[2 * k + 1], x.v[k][2], x.v[k][3]);
      multiply(norm, x.p[2 * k], x.p[2 * k + 1], 0x3F803F80u, 0x3F803F80u);
    }
  }

  DEVICE u64* part(int split) const {
    return mail.parts + (((i64)item.row * KV_HEADS + item.head) * step.splits + split) * Mail::PART + g * (DIM + 2);
  }
  // Of head g: columns warp * 16 + 2 t and the next, and 8 further on. The first split merges the others, in order.
  DEVICE void finish(float (&mixed)[2][4], float norm) const {
    const int column = warp * 16 + t * 2;
    if (g >= GROUP) return;
    float top = running(units);
    if (item.split > 0) {
      u64* at = part(item.split);
      if (warp == 0 && t == 0) send(at, __float_as_uint(top), tag), send(at + 1, __float_as_uint(norm), tag);
#pragma unroll
      for (int i = 0; i < 4; i++) send(at + 2 + column + i / 2 * 8 + i % 2, __float_as_uint(mixed[i / 2][i % 2]), tag);
      return;
    }
    const int splits = item.splits();
#pragma unroll 1
    for (int split = 1; split < splits; split++) {
      const u64* at = part(split);
      u32 sums[2][2], scales[1][2];
      receive(sums, at + 2 + column, 8, tag);
      receive(scales, at, 0, tag);
      const float m = __uint_as_float(scales[0][0]), z = __uint_as_float(scales[0][1]);
      const float new_top = fmaxf(top, m), safe = new_top == MINUS_INFINITY ? 0.0f : new_top;
      const float a = exp2_flushed(__fsub_rn(top, safe)), b = exp2_flushed(__fsub_rn(m, safe));
      top = new_top, norm = __fmaf_rn(norm, a, __fmul_rn(z, b));
#pragma unroll
      for (int i = 0; i < 4; i++)
        mixed[i / 2][i % 2] = __fmaf_rn(mixed[i / 2][i % 2], a, __fmul_rn(__uint_as_float(sums[i / 2][i % 2]), b));
    }
    if (norm == 0.0f) norm = 1.0f;
    u64* out = mail.mixed + ((i64)item.row * QUERY + (item.head * GROUP + g) * DIM + column) / 2;
#pragma unroll
    for (int i = 0; i < 2; i++)  // adding zero: as merged with nothing, minus zero too
      send(out + i * 4, pair(divide(__fadd_rn(mixed[i][0], 0.0f), norm), divide(__fadd_rn(mixed[i][1], 0.0f), norm)), tag);
  }
  DEVICE void run(Trace trace) const {
    waits(s, true);
    sync();  // the workspace is free: all warps are through with the product
    prepare();
    waits(s, false);
    trace.mark(12);
    float c[2][4][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (warp + WARPS * i < units) logits(c[i], warp + WARPS * i);
    sync();
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (warp + WARPS * i < units) weigh(c[i], warp + WARPS * i);
    sync();
    trace.mark(13);
    if (warp * 16 < DIM) {
      constexpr int BATCH = 8;  // slots that are awaited and released together
      Place values = taken.on(units);
      float mixed[2][4] = {}, norm[4] = {};
      const u32 line = lane % 16 * 128 + warp / 4 * UNIT * 128 + ((warp % 4 * 2 + lane / 16 ^ lane % 8) << 4);
      const u32 weights = shared_address(&w.weights[lane % 8][lane / 8 * 8]);
#pragma unroll 1
      for (int first = 0; first < units; first += BATCH) {
        const int here = min(units - first, BATCH);
        await_slots(s, values, here);
        Values of[2];
        Place at = values;
        open(of[0], shared_address(s.ring[at.slot]) + line, weights + first * UNIT * 2, first);
#pragma unroll
        for (int i = 0; i < BATCH; i++)
          if (i < here) {
            at = at.on(1);
            if (i + 1 < here) open(of[(i + 1) % 2], shared_address(s.ring[at.slot]) + line, weights + (first + i + 1) * UNIT * 2, first + i + 1);
            mix(mixed, norm, of[i % 2], i % 2 == 0);
          }
        fence_async();
        release_slots(s, values, here, 128 / DIM);
        values = values.on(here);
      }
      finish(mixed, norm[0]);
    }
    sync();  // the workspace is free again
  }
};
