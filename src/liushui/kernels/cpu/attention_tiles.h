// Attention's arithmetic for bfloat16, with matrix tiles (AMX) or vectors in their place (attention_pairs.h): a split
// of keys at a time, 16 query rows to a tile.
//
// Scores are [key][row] = keys times queries^T, so keys are read where they lie in the cache; a vector holds one key's
// scores for 16 rows (of several keys, where there are few rows: L lanes each), so the softmax never sums across lanes.
// Weights are bfloat16 (attention_weights.h). Weighted sums are [dimension][row] = values^T times weights; of up to 8
// rows, which pay for their values' preparation alone, [row][dimension] = weights^T times values, which need less of
// it.
//
// A row's numbers are those of its own keys, whatever else is in the tile. TDPBF16PS forms an element from its row of
// the first factor and its column of the second: the even and the odd terms each in a chain of fused operations from
// zero, the sum of both added to the tile, always rounded to nearest, subnormals as zero (Intel, Software Developer's
// Manual, volume 2, TDPBF16PS). VDPBF16PS takes both kinds in turn in one chain. So it does not matter either which of
// them is the first. A key that a row does not see has weight +0, which changes no chain; where that is not enough
// (values that are not finite) rows are computed one by one. Sums lose the sign of a zero before they are used, so that
// a last added zero cannot be seen either.
#pragma once
#include "amx.h"
#include "attention_weights.h"
#include "transpose.h"

#if defined(LS_BF16)
namespace {

constexpr int kSplitBlocks = kTileSplit / kKeys;

inline long dim_chunks(long dim) { return (dim + 31) / 32; }

// A task's query rows, the width of a head in several measures, and the tiles of rows.
struct TaskShape {
  long count, dim, padded, chunks, columns, tiles;
};

// Lane i of the result is lane i + n, around.
LS_INLINE vf rotated(vf v, int n) {
  float twice[2 * W];
  store(twice, v), store(twice + W, v);
  return load(twice + n);
}

// Lanes of the same row added up, in the order (k + k2) + (k1 + k3) of keys modulo 4; every lane has its row's sum.
template <int L>
LS_INLINE vf sum_of_rows(const vf* total) {
  if constexpr (L == 16) return (total[0] + total[2]) + (total[1] + total[3]);
  const vf sum = L == 8 ? total[0] + total[1] : total[0] + rotated(total[0], 8);
  return sum + rotated(sum, L);
}

template <int L>
LS_INLINE vf most_of_rows(vf most) {
  for (int n = L; n < W; n *= 2) most = vmax(most, rotated(most, n));
  return most;
}

// What the rows of a tile see of a split: keys [from, to) in each lane; lanes without a row hide nothing.
struct LaneSight {
  alignas(64) int32_t from[W], to[W];
  long all_from, all_to, first, last;  // what all rows see, and what any

  bool all(long block) const { return all_from <= block * kKeys && (block + 1) * kKeys <= all_to; }
};

// Brings the scores [kKeys][L] of a block into shape (minus infinity for what a row does not see) and `most` forward.
template <int L>
LS_INLINE void hide(float* scores, long block, const LaneSight& sight, const float* key_scales, vf* most) {
  constexpr int kEach = W / L;  // keys of a vector
  const bool all = sight.all(block);
  vi from, to, key;
  memcpy(&from, sight.from, sizeof from), memcpy(&to, sight.to, sizeof to);
  for (int i = 0; i < W; i++) key[i] = (int)block * kKeys + i / L;
  if (all && !key_scales) {
    vf high[4] = {most[0], most[1], most[2], most[3]};
    for (int i = 0; i < kKeys / kEach; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) high[j] = vmax(high[j], load(scores + (i + j) * W));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) most[j] = high[j];
    return;
  }
  for (int i = 0; i < kKeys / kEach; i++) {
    vf v = load(scores + i * W);
    if (key_scales) v = v * of_keys<L>(key_scales + block * kKeys + i * kEach);
    const vi k = key + i * kEach;
    if (!all) v = select((vi)(k >= from) & (vi)(k < to), v, splat(-__builtin_inff()));
    store(scores + i * W, v);
    most[i % 4] = vmax(most[i % 4], v);
  }
}

// Dimensions [d, d + 8) of a block's values: from rows of dimensions to rows of 32 keys.
LS_INLINE void turn_values(const bf16* const* values, long d, bf16* out) {
  // Four keys' dimensions beside each other, then 8 by 8 within each quarter.
  __m512i x[8], y[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    const auto part = [&](int key) { return _mm_loadu_si128((const __m128i*)(values[key] + d)); };
    __m512i v = _mm512_castsi128_si512(part(j));
    v = _mm512_inserti32x4(v, part(j + 8), 1);
    v = _mm512_inserti32x4(v, part(j + 16), 2);
    x[j] = _mm512_inserti32x4(v, part(j + 24), 3);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    y[j] = _mm512_unpacklo_epi16(x[2 * j], x[2 * j + 1]);      // dimensions 0 to 3 of keys 2j and 2j + 1
    y[j + 4] = _mm512_unpackhi_epi16(x[2 * j], x[2 * j + 1]);  // 4 to 7
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m512i *from = y + 4 * half;
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpacklo_epi32(from[2], from[3]);
    const __m512i c = _mm512_unpackhi_epi32(from[0], from[1]), e = _mm512_unpackhi_epi32(from[2], from[3]);
    bf16* to = out + 4 * half * 32;
    _mm512_storeu_si512((void*)to, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512((void*)(to + 32), _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512((void*)(to + 64), _mm512_unpacklo_epi64(c, e));
    _mm512_storeu_si512((void*)(to + 96), _mm512_unpackhi_epi64(c, e));
  }
}

// Where dimension i of 32 lies in the pairs' order: pairs are made within quarters of a register.
LS_INLINE int paired_place(int i) { return i / 8 * 4 + i % 4 + i / 4 % 2 * 16; }

// Dimensions [d, d + 32) of a block's values as the second factor: two tiles of [pair of keys][dimension][2], in the
// pairs' order.
LS_INLINE void pair_values(const bf16* const* values, long d, bf16* out) {
  for (int pair = 0; pair < 16; pair++, out += 32) {
    const bf16 *even = values[2 * pair] + d, *odd = values[2 * pair + 1] + d;
    const __m512i a = _mm512_loadu_si512((const void*)even), b = _mm512_loadu_si512((const void*)odd);
    _mm512_storeu_si512((void*)out, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512((void*)(out + 512), _mm512_unpackhi_epi16(a, b));
  }
}

inline bool all_finite(const bf16* values, long count) {
  vi odd = {};
  for (long i = 0; i < count; i += 32) {
    vu words;
    memcpy(&words, (const void*)(values + i), sizeof words);
    odd |= (vi)((words & 0x7f800000u) == 0x7f800000u) | (vi)((words & 0x7f80u) == 0x7f80u);
  }
  for (int lane = 0; lane < W; lane++)
    if (odd[lane]) return false;
  return true;
}

// 16 keys, as a tile reads them.
struct KeyTile {
  const bf16* first;
  long row_bytes;
};

// Keys and values of a split fill the nearest cache by themselves: what comes next is fetched.
inline void fetch_keys(const KeyTile* keys, long dim) {
  for (int half = 0; half < 2; half++) {
    const char* row = (const char*)keys[half].first;
    for (int r = 0; r < kTile; r++, row += keys[half].row_bytes)
      for (long i = 0; i < 2 * dim; i += 64) __builtin_prefetch(row + i, 0, 3);
  }
}

// What a tile of rows knows so far, a row in lane i % L: its highest score (a power of two) and its sum of weights.
struct LaneState {
  alignas(64) float level[W], weight[W];
};

// Sums (of the width's dimensions, for L rows) and state joined with those of the next split.
template <int L>
LS_INLINE void merge_lanes(float* sum, LaneState& state, const float* more, const LaneState& next, long padded) {
  const vf before = load(state.level), now = load(next.level), joint = vmax(before, now);
  const vf top = select((vi)(joint == splat(-__builtin_inff())), splat(0.0f), joint);  // no key yet
  const vf keep = power_of_two(before - top), add = power_of_two(now - top);
  const auto join = [&](long i, vf k, vf a) { store(sum + i, fma(load(more + i), a, load(sum + i) * k)); };
  if constexpr (L == 16) {
    for (long i = 0; i < padded * L; i += W) join(i, keep, add);
  } else {
    for (int r = 0; r < L; r++)
      for (long d = 0; d < padded; d += W) join(r * padded + d, splat(keep[r]), splat(add[r]));
  }
  store(state.level, joint);
  store(state.weight, fma(load(next.weight), add, load(state.weight) * keep));
}

}  // namespace
#endif
