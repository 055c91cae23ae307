// Squares of 16 by 16 words of 32 bits, turned over.
#pragma once
#include "simd.h"

namespace {

#if defined(__AVX512F__)
// r[i][j] becomes r[j][i], in words of 32 bits.
LS_INLINE void transpose_registers(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// out[i][j] = word i of row j: 16 rows, `apart` words from one to the next (of out: `out_apart`), of 16 words of 32 bits.
LS_INLINE void transpose_words(const uint32_t* rows, long apart, uint32_t* out, long out_apart = 16) {
#if defined(__AVX512F__)
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * apart);
  transpose_registers(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * out_apart, r[i]);
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[i * out_apart + j] = rows[j * apart + i];
#endif
}

}  // namespace
