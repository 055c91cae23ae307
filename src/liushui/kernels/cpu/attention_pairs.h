// Attention's two products in vectors of pairs, to the layouts of attention_tiles.h.
#pragma once
#include "attention_tiles.h"
#include "pairs.h"

#if defined(LS_BF16_VECTORS)
namespace {

// The nearest cache would wait for each of its few lines. And few rows take as long for their arithmetic as memory for
// their keys: the next split is on its way meanwhile.
constexpr int kFetchNear = 2;
constexpr bool kFetchLater = true;

inline void configure_attention(int) {}

template <bool two>
LS_INLINE void begin_scores(const TaskShape&, const bf16*, const bf16*) {}

// 16 bytes of each of as many keys as fill a vector of L rows, from `first` on, in the quarters of their rows.
template <int L>
LS_INLINE __m512i gathered(const char* first, long row_bytes) {
  const auto part = [&](int key) { return _mm_loadu_si128((const __m128i*)(first + key * row_bytes)); };
  __m512i v = _mm512_broadcast_i32x4(part(0));
  if constexpr (L == 8) return _mm512_mask_broadcast_i32x4(v, 0xff00, part(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, part(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, part(2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, part(3));
}

// A pair of dimensions of L rows of queries, for as many keys as fill a vector.
template <int L>
LS_INLINE vu repeated(const char* rows) {
  if constexpr (L == 4) return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)rows));
  return (vu)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)rows));
}

// Scores of a block of keys with few rows: a vector holds those of W / L keys. Four pairs of dimensions are read of each
// key, and each is spread over its rows.
template <int L>
LS_INLINE void few_scores(const KeyTile* keys, const char* queries, long dim, float* scores) {
  constexpr int kEach = W / L, kVectors = kTile / kEach;
  vf sum[2 * kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kVectors; i++) sum[i] = vf{};
  const char *first = (const char*)keys[0].first, *second = (const char*)keys[1].first;
  for (long d = 0; d < dim_chunks(dim) * 64; d += 16, queries += 16 * L) {
    const vu rows[4] = {repeated<L>(queries), repeated<L>(queries + 4 * L), repeated<L>(queries + 8 * L),
                        repeated<L>(queries + 12 * L)};
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kVectors; i++) {
      const int half = i / kVectors, key = i % kVectors * kEach;
      const long row_bytes = keys[half].row_bytes;
      const __m512i v = gathered<L>((half ? second : first) + key * row_bytes + d, row_bytes);
      sum[i] = add_pairs(sum[i], (vu)_mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x00), rows[0]);
      sum[i] = add_pairs(sum[i], (vu)_mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x55), rows[1]);
      sum[i] = add_pairs(sum[i], (vu)_mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xaa), rows[2]);
      sum[i] = add_pairs(sum[i], (vu)_mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xff), rows[3]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kVectors; i++) store(scores + i * W, sum[i]);
}

// Scores [kKeys][L] of a block of keys with one tile of rows, or with two.
template <int L, bool two>
LS_INLINE void block_scores(const TaskShape& t, const KeyTile* keys, const bf16* queries, const bf16* queries2,
                            float* scores, float* scores2) {
  if constexpr (L < 16) return few_scores<L>(keys, (const char*)queries, t.dim, scores);
  constexpr int kHigh = two ? 8 : 16;
  const PairTiles rows = {(const char*)queries, (const char*)queries2 - (const char*)queries, 64, 1024};
  for (int half = 0; half < 2; half++, scores += kTile * L, scores2 += kTile * L)
    for (int key = 0; key < kTile; key += kHigh) {
      const char* first = (const char*)keys[half].first + key * keys[half].row_bytes;
      multiply_pairs<kHigh, two ? 2 : 1>({first, keys[half].row_bytes, 64}, rows, t.chunks,
                                         {scores + key * L, L, scores2 - scores});
    }
}

// The sums of one tile of rows over blocks [begin, end). before(b, part, parts) makes the weights of block b.
template <int L, class Before>
LS_INLINE void sum_blocks(const TaskShape& t, const bf16* values, long begin, long end, const float* weights, float* sum,
                          const Before& before) {
  const long value_step = t.columns * 1024, weight_step = kKeys * L * (long)sizeof(float);
  const char* from = (const char*)values + begin * value_step;
  const char* weight = (const char*)weights + begin * weight_step;
  for (long b = begin; b < end; b++) before(b, 0, 1);
  for (long c = 0; c < t.columns;) {
    const char* column = from + c * 1024;
    if constexpr (L == 16) {
      multiply_pairs<16, 1>({column, 64, value_step}, {weight, 0, 64, weight_step}, end - begin, {sum + c * 256, L, 0});
      c++;
    } else if (L == 4 && t.columns - c >= 4) {
      multiply_pairs<L, 4>({weight, 64, weight_step}, {column, 1024, 64, value_step}, end - begin,
                           {sum + c * 16, t.padded, 16});
      c += 4;
    } else {
      multiply_pairs<L, 2>({weight, 64, weight_step}, {column, 1024, 64, value_step}, end - begin,
                           {sum + c * 16, t.padded, 16});
      c += 2;
    }
  }
}

}  // namespace
#endif
