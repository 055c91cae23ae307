// Rows of GGUF's types as float32 or bfloat16 (formulas: ggml/src/ggml-quants.c, dequantize_row_*). Every multiplication
// and addition is rounded by itself, so that the values are those of the reference, bit for bit.
#pragma once
#include "quant_pack.h"

namespace {

// Types that are only unpacked; those that are also held as they are have their numbers in quant_pack.h.
enum UnpackSource : int32_t { kFromF16 = 16, kFromQ5_1 = 17, kFromQ5_K = 18 };

// Elements and bytes of a block of `source`; 0 elements for an unknown one.
struct BlockSize {
  long elements, bytes;
};

inline BlockSize unpack_block(int source) {
  switch (source) {
    case kFromF16: return {1, 2};
    case kFromQ5_1: return {32, 24};
    case kFromQ5_K: return {256, 176};
    default: {
      const long elements = source_block(source), bytes = source_row_bytes(source, elements);
      return bytes < 0 ? BlockSize{0, 0} : BlockSize{elements, bytes};
    }
  }
}

inline float half_value(const uint8_t* at) {
  uint16_t half;
  memcpy(&half, at, 2);
  const uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
  const bool finite = magnitude < 0x7c00u;
  uint32_t bits = finite ? magnitude << 13 : magnitude << 13 | 0x7f800000u;
  float value;
  memcpy(&value, &bits, 4);
  if (finite) value *= 0x1p112f;  // the exponent's bias; exact, for subnormal ones too
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

// 2 `count` values: the low halves of the bytes, then the high halves.
inline void unpack_nibbles(const uint8_t* bytes, int count, float* out) {
  for (int i = 0; i < count; i++) out[i] = (float)(bytes[i] & 15);
  for (int i = 0; i < count; i++) out[count + i] = (float)(bytes[i] >> 4);
}

inline void unpack_fifth_bits(const uint8_t* at, float* out) {  // adds 16 where the bit is set
  uint32_t bits;
  memcpy(&bits, at, 4);
  for (int i = 0; i < 32; i++) out[i] += (float)((bits >> i & 1u) << 4);
}

// out = out * scale + add, in two roundings.
inline void scale_and_add(float* out, int count, float scale, float add) {
  for (int i = 0; i < count; i++) {
    const float scaled = out[i] * scale;
    out[i] = scaled + add;
  }
}

inline void unpack_block_32(int source, const uint8_t* from, float* out) {
  const float scale = half_value(from);
  switch (source) {
    case kFromQ8_0:
      for (int i = 0; i < 32; i++) out[i] = (float)(int8_t)from[2 + i] * scale;
      break;
    case kFromQ4_0:
      unpack_nibbles(from + 2, 16, out);
      for (int i = 0; i < 32; i++) out[i] = (out[i] - 8.0f) * scale;
      break;
    case kFromQ4_1:
      unpack_nibbles(from + 4, 16, out);
      scale_and_add(out, 32, scale, half_value(from + 2));
      break;
    case kFromQ5_0:
      unpack_nibbles(from + 6, 16, out);
      unpack_fifth_bits(from + 2, out);
      for (int i = 0; i < 32; i++) out[i] = (out[i] - 16.0f) * scale;
      break;
    default:  // Q5_1
      unpack_nibbles(from + 8, 16, out);
      unpack_fifth_bits(from + 4, out);
      scale_and_add(out, 32, scale, half_value(from + 2));
  }
}

// The eight 6-bit scales and minima at bytes 4 to 15 of a K block; its two float16 lead it.
inline void unpack_scales_k(const uint8_t* from, float* out) {
  const float scale = half_value(from), minimum = half_value(from + 2);
  const uint8_t *low = from + 4, *mid = from + 8, *high = from + 12;
  for (int g = 0; g < 8; g++) {
    const int factor = g < 4 ? low[g] & 63 : (high[g - 4] & 15) | (low[g - 4] >> 2 & 48);
    const int less = g < 4 ? mid[g] & 63 : high[g - 4] >> 4 | (mid[g - 4] >> 2 & 48);
    scale_and_add(out + g * 32, 32, scale * (float)factor, -(minimum * (float)less));
  }
}

inline void unpack_block_256(int source, const uint8_t* from, float* out) {
  if (source == kFromQ6_K) {
    const float scale = half_value(from + 208);
    for (int g = 0; g < 8; g++) {
      const int half = g / 4, quarter = g % 4;
      const uint8_t *low = from + half * 64 + quarter % 2 * 32, *high = from + 128 + half * 32;
      for (int i = 0; i < 32; i++) {
        const float factor = scale * (float)(int8_t)from[192 + g * 2 + i / 16];
        const int q = ((low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (quarter * 2) & 3) << 4) - 32;
        out[g * 32 + i] = (float)q * factor;
      }
    }
    return;
  }
  const uint8_t* nibbles = from + (source == kFromQ4_K ? 16 : 48);
  for (int g = 0; g < 4; g++) unpack_nibbles(nibbles + g * 32, 32, out + g * 64);
  if (source == kFromQ5_K)
    for (int g = 0; g < 8; g++)
      for (int i = 0; i < 32; i++) out[g * 32 + i] += (float)((from[16 + i] >> g & 1) << 4);
  unpack_scales_k(from, out);
}

// One row of k values.
inline void unpack_row(int source, const uint8_t* from, long k, float* out) {
  const BlockSize block = unpack_block(source);
  if (source == kFromF32) {
    memcpy(out, from, (size_t)k * 4);
  } else if (source == kFromF16) {
    for (long i = 0; i < k; i++) out[i] = half_value(from + 2 * i);
  } else if (source == kFromBF16) {
    for (long i = 0; i < k; i++) out[i] = widen(((const bf16*)from)[i]);
  } else {
    for (long i = 0; i < k; i += block.elements, from += block.bytes)
      (block.elements == 32 ? unpack_block_32 : unpack_block_256)(source, from, out + i);
  }
}

// Subnormals stay what they are.
inline void narrow_row(const float* from, long k, bf16* to) {
  each_vector(0, k, [&](long i, long n) {
    const vh h = narrowed(load_up_to(from + i, n));
    memcpy((void*)(to + i), &h, (size_t)n * sizeof(bf16));
  });
}

// Rows [begin, end) as T, one after the other, to `out`.
template <class T>
void unpack_rows(int source, const uint8_t* rows, long k, long begin, long end, T* out) {
  const BlockSize block = unpack_block(source);
  const long bytes = k / block.elements * block.bytes;
  for (long row = begin; row < end; row++) {
    T* to = out + (row - begin) * k;
    if constexpr (sizeof(T) == 4) {
      unpack_row(source, rows + row * bytes, k, to);
    } else {
      float* wide = (float*)liushui::scratch(liushui::kWork, (size_t)k * sizeof(float));
      unpack_row(source, rows + row * bytes, k, wide);
      narrow_row(wide, k, to);
    }
  }
}

}  // namespace
