// Values of 8 bits as bfloat16: tiles of pairs of k, as the second factor of a product has them.
//
// A vector of 64 bytes holds 16 columns with four values of k, ready to be spread within its quarters: byte 4 d + j of
// quarter i is value 2 (j / 2) + d % 2 of column 8 (j % 2) + 2 i + d / 2. 128 has been added to it.
//
// Beside tile instructions a core of Sapphire Rapids does two simple operations a cycle, one fused one and one shuffle;
// conversion takes the shuffles' unit twice. So what can be cut out in place is not shuffled. Without tiles a lone row
// takes longer: VDPBF16PS, in whose chains of two steps TDPBF16PS's bits can be had, needs that unit twice, too (16 x 32
// weights in 44 ns; with tiles in 33).
#pragma once
#include "quant.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr uint8_t kByteFlip = 0x80;

// Where value i of the 32 lies that column c of 16 has in a group.
constexpr int byte_place(int c, int i) {
  return i / 4 * 64 + c % 8 / 2 * 16 + (c % 2 * 2 + i % 2) * 4 + i % 4 / 2 * 2 + c / 8;
}

// Two vectors of float as 32 words of bfloat16.
LS_INLINE vw words_of(vf low, vf high) {
  return (vw)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// 32768 + byte kByte of each 32 bits: where a float's bits count 1, 2, 4 ... of it.
template <int kByte>
LS_INLINE vf above_32768(vw bytes) {
  const __m512i base = _mm512_set1_epi32(0x47000000);
  if constexpr (kByte == 1) {
    constexpr int kAndOr = 0xea;
    return (vf)_mm512_ternarylogic_epi32((__m512i)bytes, _mm512_set1_epi32(0xff00), base, kAndOr);
  }
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_set_epi32((12 + kByte) << 8, (8 + kByte) << 8, (4 + kByte) << 8, kByte << 8));
  return (vf)_mm512_mask_shuffle_epi8(base, 0x2222222222222222, (__m512i)bytes, order);
}

// Times a scale, what is 32768 + 128 too much. kShort: scales of 11 bits; that times them is exact then (9 bits more).
template <bool kShort>
struct ByteScales {
  static constexpr float kTooMuch = 32896.0f;
  vf scale, less;

  LS_INLINE explicit ByteScales(vf scale) : scale(scale), less(scale * -kTooMuch) {}
  LS_INLINE vf operator()(vf above) const { return kShort ? fma(above, scale, less) : (above - kTooMuch) * scale; }
};

// 16 columns of a group, or of `count` pairs of k of it, with their scales [16] -> [pair of k][column][2].
template <bool kShort>
LS_INLINE void expand_pairs(const uint8_t* values, vf s, int count, bf16* to) {
  const ByteScales<kShort> low(__builtin_shufflevector(s, s, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
  const ByteScales<kShort> high(__builtin_shufflevector(s, s, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15));
#pragma GCC unroll 8
  for (int i = 0; i < count / 2; i++) {
    vw bytes;
    memcpy(&bytes, values + i * 64, sizeof bytes);
    const vw pairs[2] = {words_of(low(above_32768<0>(bytes)), high(above_32768<1>(bytes))),
                         words_of(low(above_32768<2>(bytes)), high(above_32768<3>(bytes)))};
    memcpy((void*)(to + i * 64), pairs, sizeof pairs);
  }
}

}  // namespace
#endif
