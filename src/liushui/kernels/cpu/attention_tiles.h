// Attention's arithmetic on one block of keys with matrix tiles (AMX), for bfloat16: 16 query rows at a time.
//
// Scores are products of bfloat16 summed in float32, scaled afterwards; weights are rounded to bfloat16 before they
// multiply the values. A row's numbers do not depend on the other rows of its tile: what a row does not see has
// weight zero, and where that is not enough (values that are not finite) rows are computed one by one.
#pragma once
#include "amx.h"
#include "attention_block.h"

#if defined(LS_TILE_BF16)
namespace {

static_assert(W == 16 && kKeys == 32, "a block of keys is the depth of a tile");
typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));

// As lane_sum.
LS_INLINE float fold_sum(vf v) {
  v8f a, b;
  memcpy(&a, &v, 32), memcpy(&b, (const char*)&v + 32, 32);
  a += b;
  v4f c, d;
  memcpy(&c, &a, 16), memcpy(&d, (const char*)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

LS_INLINE float fold_max(vf v) {
  v8f a, b;
  memcpy(&a, &v, 32), memcpy(&b, (const char*)&v + 32, 32);
  const v8f larger = a > b ? a : b;
  v4f c, d;
  memcpy(&c, &larger, 16), memcpy(&d, (const char*)&larger + 16, 16);
  const v4f most = c > d ? c : d;
  const float even = most[0] > most[2] ? most[0] : most[2], odd = most[1] > most[3] ? most[1] : most[3];
  return even > odd ? even : odd;
}

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

// out[i][j] = word i of row j: 16 rows of 16 words of 32 bits.
LS_INLINE void transpose_words(const uint32_t* const* rows, uint32_t* out) {
#if defined(__AVX512F__)
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i]);
  transpose_registers(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * 16, r[i]);
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[i * 16 + j] = rows[j][i];
#endif
}

// Each row's lanes folded as fold_sum and fold_max do it; many rows are folded side by side.
template <bool kSum>
LS_INLINE vf fold_rows(const vf* rows, int count) {
#if defined(__AVX512F__)
  if (count > 4) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = (__m512i)rows[i];
    transpose_registers(r);
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; i++) {
        const vf a = (vf)r[i], b = (vf)r[i + half];
        r[i] = (__m512i)(kSum ? a + b : vmax(a, b));
      }
    return (vf)r[0];
  }
#endif
  alignas(64) float folded[W] = {};
  for (int i = 0; i < count; i++) folded[i] = kSum ? fold_sum(rows[i]) : fold_max(rows[i]);
  return load(folded);
}

inline long dim_chunks(long dim) { return (dim + 31) / 32; }
inline long dim_tiles(long dim) { return (dim + 15) / 16; }

// Keys as the second factor of the scores: [chunk of 32 dimensions][half][pair of dimensions][key][2].
// Meanwhile the next block's keys are fetched.
inline void tile_keys(const bf16* const* keys, const bf16* const* ahead, long dim, bf16* out) {
  for (long c = 0; c < dim_chunks(dim); c++)
    for (int half = 0; half < 2; half++, out += 512) {
      alignas(64) uint32_t copies[16][16];
      const uint32_t* rows[16];
      const long count = min_of(32, dim - c * 32);
      for (int j = 0; j < 16; j++) {
        const bf16* key = keys[half * 16 + j] + c * 32;
        __builtin_prefetch(ahead[half * 16 + j] + c * 32);
        rows[j] = (const uint32_t*)key;
        if (count == 32) continue;
        memset(copies[j], 0, 64);
        memcpy(copies[j], (const void*)key, (size_t)count * sizeof(bf16));
        rows[j] = copies[j];
      }
      transpose_words(rows, (uint32_t*)out);
    }
}

// Values as the second factor of the weighted sums: [tile of 16 dimensions][pair of keys][dimension][2].
inline void tile_values(const bf16* const* values, const bf16* const* ahead, long dim, bf16* out) {
#if defined(__AVX512BW__)
  if (dim % 32 == 0) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; i++) low[i] = (uint16_t)(i / 2 + i % 2 * 32), high[i] = (uint16_t)(low[i] + 16);
    const __m512i pick_low = _mm512_load_si512(low), pick_high = _mm512_load_si512(high);
    for (int pair = 0; pair < 16; pair++)
      for (long i = 0; i < dim; i += 32) {
        const __m512i even = _mm512_loadu_si512(values[2 * pair] + i), odd = _mm512_loadu_si512(values[2 * pair + 1] + i);
        __builtin_prefetch(ahead[2 * pair] + i);
        __builtin_prefetch(ahead[2 * pair + 1] + i);
        bf16* to = out + i / 16 * 512 + pair * 32;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, pick_low, odd));
        _mm512_storeu_si512(to + 512, _mm512_permutex2var_epi16(even, pick_high, odd));
      }
    return;
  }
#endif
  const auto words = [](const bf16* p, long n) {
    uint16_t buffer[16] = {};
    if (n < 16)
      memcpy(buffer, (const void*)p, (size_t)n * 2);
    vh h;
    memcpy(&h, n < 16 ? (const void*)buffer : (const void*)p, sizeof h);
    return __builtin_convertvector(h, vu);
  };
  for (int pair = 0; pair < 16; pair++) {
    const bf16 *even = values[2 * pair], *odd = values[2 * pair + 1];
    for (long i = 0; i < dim; i += 32) {
      __builtin_prefetch(ahead[2 * pair] + i);
      __builtin_prefetch(ahead[2 * pair + 1] + i);
    }
    for (long t = 0; t < dim_tiles(dim); t++) {
      const long n = dim - t * 16;
      const vu both = words(even + t * 16, n) | words(odd + t * 16, n) << 16;
      memcpy((void*)(out + t * 512 + pair * 32), &both, sizeof both);
    }
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

// scores [16, kKeys] = query tile times keys. query [chunk][16][32].
inline void tile_scores(const bf16* query, const bf16* keys, long dim, float* scores) {
  LS_TILE_ZERO(0);
  LS_TILE_ZERO(1);
  for (long c = 0; c < dim_chunks(dim); c++) {
    LS_TILE_LOAD(4, query + c * 512, 64);
    LS_TILE_LOAD(6, keys + c * 1024, 64);
    LS_TILE_LOAD(7, keys + c * 1024 + 512, 64);
    LS_TILE_BF16(0, 4, 6);
    LS_TILE_BF16(1, 4, 7);
  }
  LS_TILE_STORE(0, scores, kKeys * 4);
  LS_TILE_STORE(1, scores + 16, kKeys * 4);
}

// sum [16, padded dim] += weights [16, kKeys] times values.
inline void tile_weighted(const bf16* weights, const bf16* values, long dim, float* sum, long padded) {
  const long columns = dim_tiles(dim), stride = padded * 4;
  LS_TILE_LOAD(4, weights, 64);
  for (long t = 0; t < columns; t += 4) {
    const long left = columns - t;
    float* to = sum + t * 16;
    const bf16* from = values + t * 512;
    LS_TILE_LOAD(0, to, stride);
    LS_TILE_LOAD(6, from, 64);
    LS_TILE_BF16(0, 4, 6);
    if (left > 1) {
      LS_TILE_LOAD(1, to + 16, stride);
      LS_TILE_LOAD(7, from + 512, 64);
      LS_TILE_BF16(1, 4, 7);
    }
    if (left > 2) {
      LS_TILE_LOAD(2, to + 32, stride);
      LS_TILE_LOAD(6, from + 1024, 64);
      LS_TILE_BF16(2, 4, 6);
    }
    if (left > 3) {
      LS_TILE_LOAD(3, to + 48, stride);
      LS_TILE_LOAD(7, from + 1536, 64);
      LS_TILE_BF16(3, 4, 7);
    }
    LS_TILE_STORE(0, to, stride);
    if (left > 1) LS_TILE_STORE(1, to + 16, stride);
    if (left > 2) LS_TILE_STORE(2, to + 32, stride);
    if (left > 3) LS_TILE_STORE(3, to + 48, stride);
  }
}

// As `soften`, for up to 16 rows; the weights come out as bfloat16 [16, kKeys], zero for what a row does not see.
// `largest` and `weight` have 16 places.
inline void tile_soften(int rows, const Sight& sight, const float* scores, float scale, const float* key_scales,
                        const float* value_scales, float* largest, float* weight, float* keep, bf16* weights) {
  const float lowest = -__builtin_inff();
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  const vf left = key_scales ? load(key_scales) * scale : splat(scale);
  const vf right = key_scales ? load(key_scales + W) * scale : splat(scale);
  const bool all = sight.all_from == 0 && sight.all_to == kKeys;
  vf most[kTile], total[kTile];
  for (int r = rows; r < kTile; r++) most[r] = splat(lowest), total[r] = vf{};
  alignas(64) float scaled[kTile][kKeys], joint[W];
  for (int r = 0; r < rows; r++) {
    vf a = load(scores + r * kKeys) * left, b = load(scores + r * kKeys + W) * right;
    if (!all) {
      const int from = (int)sight.from[r], to = (int)sight.to[r];
      a = select((vi)(lane >= from) & (vi)(lane < to), a, splat(lowest));
      b = select((vi)(lane >= from - W) & (vi)(lane < to - W), b, splat(lowest));
    }
    store(scaled[r], a), store(scaled[r] + W, b);
    most[r] = vmax(a, b);
  }
  const vf now = fold_rows<false>(most, rows), before = load(largest), sums = load(weight);
  const vf highest = select((vi)(now > before), now, before);
  const vf drop = vexp_of_negative(select((vi)(sums == splat(0.0f)), splat(lowest), before - highest));
  store(joint, highest);
  store(largest, highest);
  for (int r = 0; r < rows; r++) {
    bf16* to = weights + r * kKeys;
    total[r] = vf{};
    if (!all && sight.to[r] == 0) {  // sees nothing here
      memset((void*)to, 0, kKeys * sizeof(bf16));
      continue;
    }
    const vf level = splat(joint[r]);
    vf a = vexp_of_negative(load(scaled[r]) - level), b = vexp_of_negative(load(scaled[r] + W) - level);
    total[r] = a + b;
    if (value_scales) a = a * load(value_scales), b = b * load(value_scales + W);
    store(to, a), store(to + W, b);
  }
  store(keep, drop);
  store(weight, sums * drop + fold_rows<true>(total, rows));
  for (int r = 0; r < rows && !all; r++)
    if (sight.to[r] == 0) keep[r] = 1.0f;
}

LS_INLINE void keep_rows(int rows, const float* keep, float* sum, long padded) {
  for (int r = 0; r < rows; r++)
    if (keep[r] != 1.0f)
      for (long d = 0; d < padded; d += W) store(sum + r * padded + d, load(sum + r * padded + d) * keep[r]);
}

// The slow way, where a value that some row does not see is not finite: each row with its own values only.
inline void weighted_one_by_one(int rows, const Sight& sight, const bf16* weights, const bf16* values, long dim,
                                float* sum, long padded, bf16* seen, float* trial) {
  const size_t row_bytes = (size_t)padded * sizeof(float);
  for (int r = 0; r < rows; r++) {
    if (sight.to[r] == 0) continue;
    for (long t = 0; t < dim_tiles(dim); t++)
      for (int key = 0; key < kKeys; key++)
        for (int d = 0; d < 16; d++) {
          const long at = t * 512 + key / 2 * 32 + d * 2 + key % 2;
          seen[at] = key >= sight.from[r] && key < sight.to[r] ? values[at] : bf16{0};
        }
    memcpy(trial, sum, (size_t)kTile * row_bytes);
    tile_weighted(weights, seen, dim, trial, padded);
    memcpy(sum + r * padded, trial + r * padded, row_bytes);
  }
}

}  // namespace
#endif
