// Integer weights into panels: from GGUF's blocks as they are (formulas: ggml/src/ggml-quants.c), or from float32.
#pragma once
#include "quant.h"

namespace {

// What a weight is packed from.
enum Source : int32_t {
  kFromF32 = 0,
  kFromBF16 = 1,
  kFromQ8_0 = 2,
  kFromQ4_0 = 3,
  kFromQ4_1 = 4,
  kFromQ4_K = 5,
  kFromQ6_K = 6,
  kFromQ5_0 = 7,
};

inline long source_row_bytes(int source, long k) {
  switch (source) {
    case kFromF32: return k * 4;
    case kFromBF16: return k * 2;
    case kFromQ8_0: return k / 32 * 34;
    case kFromQ4_0: return k / 32 * 18;
    case kFromQ4_1: return k / 32 * 20;
    case kFromQ5_0: return k / 32 * 22;
    case kFromQ4_K: return k / 256 * 144;
    case kFromQ6_K: return k / 256 * 210;
    default: return -1;
  }
}

inline long source_block(int source) {
  return source == kFromQ4_K || source == kFromQ6_K ? 256 : source == kFromF32 || source == kFromBF16 ? 1 : 32;
}

// Where one column's values and scales go within a panel.
struct Column {
  uint8_t *values, *scales;
  int column;
  Format format;

  void put(long group, const int8_t* q) const {  // 32 values
    uint8_t* to = values + group * format.value_bytes + column * 4;
    for (int step = 0; step < 8; step++)
      for (int i = 0; i < 4; i++) {
        if (!format.nibbles)
          to[step * 64 + i] = (uint8_t)q[step * 4 + i];
        else if (step < 4)
          to[step * 64 + i] = (uint8_t)(q[step * 4 + i] | q[(step + 4) * 4 + i] << 4);
      }
  }
  uint8_t* half(long block, int which) const { return scales + block * format.scale_bytes + which * 32 + column * 2; }
  // Small factors of a superblock: of group `g` (32 values in 4 bits, else 16).
  uint8_t* factor(long block, int g, int which) const {
    const long first = format.minimum ? 64 + g * 32 : 32 + g * 16;
    return scales + block * format.scale_bytes + first + which * 16 + column;
  }
};

inline void low_and_high(const uint8_t* bytes, int count, int8_t* q) {
  for (int i = 0; i < count; i++) {
    q[i] = bytes[i] & 15;
    q[count + i] = bytes[i] >> 4;
  }
}

template <class To>
void pack_block_32(int source, const uint8_t* from, long group, const To& to) {
  int8_t q[32];
  memcpy(to.half(group, 0), from, 2);
  if (source == kFromQ8_0) {
    memcpy(q, from + 2, 32);
  } else if (source == kFromQ4_1) {
    memcpy(to.half(group, 1), from + 2, 2);
    low_and_high(from + 4, 16, q);
  } else if (source == kFromQ4_0) {
    low_and_high(from + 2, 16, q);
  } else {  // Q5_0: the fifth bits come first
    low_and_high(from + 6, 16, q);
    for (int i = 0; i < 32; i++) q[i] = (int8_t)((q[i] | (from[2 + i / 8] >> (i % 8) & 1) << 4) - 16);
  }
  to.put(group, q);
}

template <class To>
void pack_q4_k(const uint8_t* from, long block, const To& to) {
  memcpy(to.half(block, 0), from, 2);
  memcpy(to.half(block, 1), from + 2, 2);
  const uint8_t *low = from + 4, *mid = from + 8, *high = from + 12;
  for (int g = 0; g < 8; g++) {
    *to.factor(block, g, 0) = (uint8_t)(g < 4 ? low[g] & 63 : (high[g - 4] & 15) | (low[g - 4] >> 2 & 48));
    *to.factor(block, g, 1) = (uint8_t)(g < 4 ? mid[g] & 63 : high[g - 4] >> 4 | (mid[g - 4] >> 2 & 48));
    int8_t q[32];
    for (int i = 0; i < 32; i++) q[i] = (int8_t)(from[16 + g / 2 * 32 + i] >> (g % 2 * 4) & 15);
    to.put(block * 8 + g, q);
  }
}

template <class To>
void pack_q6_k(const uint8_t* from, long block, const To& to) {
  memcpy(to.half(block, 0), from + 208, 2);
  for (int g = 0; g < 16; g++) *to.factor(block, g, 0) = from[192 + g];
  for (int g = 0; g < 8; g++) {
    const int half = g / 4, quarter = g % 4;
    const uint8_t *low = from + half * 64 + quarter % 2 * 32, *high = from + 128 + half * 32;
    int8_t q[32];
    for (int i = 0; i < 32; i++)
      q[i] = (int8_t)(((low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (quarter * 2) & 3) << 4) - 32);
    to.put(block * 8 + g, q);
  }
}

inline uint16_t half_of(float x) {  // to nearest, ties to even; x is not NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: the addition rounds at the right place
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  return (uint16_t)(sign | (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

// Symmetric groups of 32: the scale so that the largest magnitude becomes 127, or 4-bit values from -8 with the
// scale's sign such that the largest is -8 (as GGUF's Q8_0 and Q4_0).
template <class To>
void pack_floats(const float* from, long count, long group, const To& to) {
  float extreme = 0.0f;
  for (long i = 0; i < count; i++)
    if (__builtin_fabsf(from[i]) > __builtin_fabsf(extreme)) extreme = from[i];
  const bool nibbles = to.format.nibbles;
  const uint16_t half = half_of(nibbles ? extreme / -8.0f : __builtin_fabsf(extreme) / 127.0f);
  memcpy(to.half(group, 0), &half, 2);
  uint16_t sixteen[16] = {half};
  float scales[16];
  halves(sixteen, scales);
  const float inverse = scales[0] != 0.0f ? 1.0f / scales[0] : 0.0f;
  const int low = nibbles ? -8 : -127, high = nibbles ? 7 : 127;
  int8_t q[32] = {};
  for (int i = 0; i < 32; i++) {
    const float scaled = i < count ? from[i] * inverse : 0.0f;
    const float bounded = scaled >= (float)low ? (scaled <= (float)high ? scaled : (float)high) : (float)low;
    q[i] = (int8_t)((int)__builtin_rintf(bounded) + (nibbles ? 8 : 0));
  }
  to.put(group, q);
}

// One column: a row of `source` at `from`.
template <class To>
void pack_column(const PackedWeight& w, int source, const uint8_t* from, long row_bytes, const To& to) {
  const long groups = groups_of(w);
  if (source == kFromQ4_K || source == kFromQ6_K) {
    for (long block = 0; block < w.k / 256; block++)
      if (source == kFromQ4_K)
        pack_q4_k(from + block * 144, block, to);
      else
        pack_q6_k(from + block * 210, block, to);
  } else {
    for (long g = 0; g < groups; g++)
      if (source == kFromF32)
        pack_floats((const float*)from + g * 32, min_of(32, w.k - g * 32), g, to);
      else
        pack_block_32(source, from + g * (row_bytes / groups), g, to);
  }
}

// Panel `panel` of a weight whose rows, `row_bytes` each, start at `source`.
inline void quant_pack_panel(const PackedWeight& w, int source, const uint8_t* rows, long row_bytes, long panel,
                             uint8_t* data) {
  const Format f = format_of(w.format);
  const long bytes = quant_panel_bytes(w);
  uint8_t* to = data + panel * bytes;
  memset(to, 0, (size_t)bytes);
  for (int c = 0; c < kColumns && panel * kColumns + c < w.n; c++)
    pack_column(w, source, rows + (panel * kColumns + c) * row_bytes, row_bytes,
                Column{to, to + groups_of(w) * f.value_bytes, c, f});
}

// Row `row` of the weight as float32: the product q * scale, then the minimum added, each rounded.
inline void quant_embed(const PackedWeight& w, long row, float* out) {
  const Format f = format_of(w.format);
  const long groups = groups_of(w), panel = row / kColumns, c = row % kColumns;
  const int parts = kInnerGroup / f.group;
  const uint8_t* values = (const uint8_t*)w.data + panel * quant_panel_bytes(w);
  const long count = groups * parts * kColumns;
  float* scales = (float*)liushui::scratch(liushui::kProduct, (size_t)(2 * count) * sizeof(float));
  float* minima = scales + count;
  expand_scales(w.format, values + groups * f.value_bytes, groups, scales, minima);
  for (long k = 0; k < w.k; k++) {
    const long g = k / 32, step = k % 32 / 4;
    const uint8_t byte = values[g * f.value_bytes + (f.nibbles ? step % 4 : step) * 64 + c * 4 + k % 4];
    const int q = f.nibbles ? (step < 4 ? byte & 15 : byte >> 4) - f.offset : (int8_t)byte;
    const long at = k / f.group * kColumns + c;
    const float value = (float)q * scales[at];
    out[k] = f.minimum ? value + minima[at] : value;
  }
}

}  // namespace
