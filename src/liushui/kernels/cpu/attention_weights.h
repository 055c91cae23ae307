// The weights of attention's tiles (attention_tiles.h): powers of two of scores, in bfloat16, formed in whole numbers.
//
// A bfloat16 of 2^t is t + 127 with 7 bits of fraction, as a whole number, less a little: the mantissa is 2^f - 1, not
// f, f being the fraction of t. With 8 bits of fraction, a table of that little for 64 ranges of f, and the last bit
// rounded away, a weight is within 0.9 % of the power, its root mean square error 0.20 %; of the nearest bfloat16 these
// are 0.39 and 0.17 %. It takes two thirds of the time of the power in float32 and its rounding, for which prompts wait.
// Rows are divided by the sums of these weights, so that what their errors have in common cancels.
#pragma once
#include "attention_block.h"

#if defined(LS_BF16)
namespace {

static_assert(W == 16 && kKeys == 32, "a block of keys is the depth of a tile");

typedef uint16_t vp __attribute__((vector_size(64)));  // 32 weights

constexpr float kWeightUnits = 256.0f;
constexpr float kWeightOfOne = 127.0f * kWeightUnits + 1.0f;  // one more, for the rounding

// In the weights' order: those of two vectors, lane by lane beside each other, or one vector after the other.
struct WeightTables {
  alignas(64) uint8_t less[64], fields[64];
  alignas(64) uint16_t beside[32], after[32];

  constexpr WeightTables()
      : less{0,  1,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 13, 14, 15, 16, 16, 17, 18, 18, 19,
             19, 20, 20, 20, 21, 21, 21, 22, 22, 22, 22, 22, 22, 22, 22, 22, 22, 21, 21, 21, 21, 20,
             20, 19, 19, 18, 17, 17, 16, 15, 14, 13, 12, 11, 10, 9,  8,  7,  6,  4,  3,  1},
        fields(), beside(), after() {
    for (int i = 0; i < 64; i++) fields[i] = (uint8_t)(i / 2 % 4 * 16 + 2);
    for (int i = 0; i < 16; i++) {
      const int place = i / 4 * 8 + i % 4;  // packing goes by quarters
      beside[2 * i] = after[i] = (uint16_t)place;
      beside[2 * i + 1] = after[i + 16] = (uint16_t)(place + 4);
    }
  }
};
static constexpr WeightTables kWeightTables;

// Weights of t, given as kWeightUnits * t + kWeightOfOne; 0 below the smallest, and of what is not a number.
template <bool kBeside>
LS_INLINE vp whole_weights(vf first, vf second) {
  const __m512i less = _mm512_load_si512(kWeightTables.less), fields = _mm512_load_si512(kWeightTables.fields);
  const __m512i order = _mm512_load_si512(kBeside ? kWeightTables.beside : kWeightTables.after);
  __m512i v = _mm512_packus_epi32(_mm512_cvtps_epi32((__m512)first), _mm512_cvtps_epi32((__m512)second));
  const __m512i range = _mm512_multishift_epi64_epi8(fields, v);
  v = _mm512_subs_epu16(v, _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, range, less));
  return (vp)_mm512_permutexvar_epi16(order, _mm512_srli_epi16(v, 1));
}

// Weights of lanes beside each other, as floats.
LS_INLINE vf first_of(vp beside) { return (vf)((vu)beside << 16); }
LS_INLINE vf second_of(vp beside) { return (vf)((vu)beside & 0xffff0000u); }

// scales[key] for the lanes of that key's rows.
template <int L>
LS_INLINE vf of_keys(const float* scales) {
  if constexpr (L == 16) return splat(*scales);
  vf v;
  for (int i = 0; i < W; i++) v[i] = scales[i / L];
  return v;
}

// Weights of two keys for 16 rows as the second factor of the sums: [row][2].
LS_INLINE void store_pair(bf16* to, vf first, vf second) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512((void*)to, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

// Weights [kKeys][L] of a block for few rows as the first factor of the sums: [row][key].
template <int L>
LS_INLINE void store_rows(bf16* to, const vf* p) {
  constexpr int kPairs = L / 2, kTogether = 64 / L;  // two vectors of bfloat16 hold that many keys
  struct Order {
    alignas(64) uint16_t from[2][32];
    constexpr Order() : from() {
      for (int i = 0; i < 64; i++) from[i / 32][i % 32] = (uint16_t)(i % kTogether * L + i / kTogether);
    }
  };
  static constexpr Order order;
  const __m512i low = _mm512_load_si512(order.from[0]), high = _mm512_load_si512(order.from[1]);
  __m512i part[2][kPairs];  // the lower and the upper half of the rows, [row][kTogether keys]
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; i++) {
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[4 * i + 1], (__m512)p[4 * i]);
    const __m512i b = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[4 * i + 3], (__m512)p[4 * i + 2]);
    part[0][i] = _mm512_permutex2var_epi16(a, low, b);
    part[1][i] = _mm512_permutex2var_epi16(a, high, b);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++, to += L / 2 * kKeys) {
    const __m512i* from = part[half];
    if constexpr (L == 4) {
      _mm512_storeu_si512((void*)to, _mm512_shuffle_i64x2(from[0], from[1], 0x44));
      _mm512_storeu_si512((void*)(to + 32), _mm512_shuffle_i64x2(from[0], from[1], 0xee));
    } else {
      const __m512i a = _mm512_shuffle_i64x2(from[0], from[1], 0x88), b = _mm512_shuffle_i64x2(from[0], from[1], 0xdd);
      const __m512i c = _mm512_shuffle_i64x2(from[2], from[3], 0x88), e = _mm512_shuffle_i64x2(from[2], from[3], 0xdd);
      _mm512_storeu_si512((void*)to, _mm512_shuffle_i64x2(a, c, 0x88));
      _mm512_storeu_si512((void*)(to + 32), _mm512_shuffle_i64x2(b, e, 0x88));
      _mm512_storeu_si512((void*)(to + 64), _mm512_shuffle_i64x2(a, c, 0xdd));
      _mm512_storeu_si512((void*)(to + 96), _mm512_shuffle_i64x2(b, e, 0xdd));
    }
  }
}

// Scores of a block become weights 2^(score * scale - level), in bfloat16 where the scores were; `total` is brought
// forward. Part `part` of `parts`, in order.
template <int L>
LS_INLINE void weigh(float* scores, float scale, vf level, const float* value_scales, vf* total, int part, int parts) {
  constexpr int kEach = W / L, kSums = 4 / kEach, kVectors = kKeys / kEach;
  const vf units = splat(scale * kWeightUnits), offset = fma(level, splat(-kWeightUnits), splat(kWeightOfOne));
  const auto raised = [&](int i) { return fma(load(scores + i * W), units, offset); };
  bf16* to = (bf16*)scores;
  if constexpr (L == 16) {
#pragma GCC unroll 4
    for (int i = kVectors / parts * part; i < kVectors / parts * (part + 1); i += 2) {
      const vp pairs = whole_weights<true>(raised(i), raised(i + 1));
      const vf first = first_of(pairs), second = second_of(pairs);
      total[i % 4] = total[i % 4] + first, total[i % 4 + 1] = total[i % 4 + 1] + second;
      if (value_scales)
        store_pair(to + i * W, first * splat(value_scales[i]), second * splat(value_scales[i + 1]));
      else
        memcpy((void*)(to + i * W), &pairs, sizeof pairs);
    }
  } else {
    vf p[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i += 2) {
      const vp words = whole_weights<false>(raised(i), raised(i + 1));
      p[i] = load((const bf16*)&words), p[i + 1] = load((const bf16*)&words + W);
#pragma GCC unroll 2
      for (int j = i; j < i + 2; j++) {
        total[j % kSums] = total[j % kSums] + p[j];
        if (value_scales) p[j] = p[j] * of_keys<L>(value_scales + j * kEach);
      }
    }
    store_rows<L>(to, p);
  }
}

}  // namespace
#endif
