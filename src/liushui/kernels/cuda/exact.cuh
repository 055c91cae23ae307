// What the decoder is made of besides single instructions: exact types, exact sums.
#pragma once
#include "ptx.cuh"

DEVICE float widen(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
DEVICE u32 pair(u16 low, u16 high) { return static_cast<u32>(low) | static_cast<u32>(high) << 16; }
DEVICE u32 pair(float low, float high) { return pair(narrow(low), narrow(high)); }
DEVICE float low_half(u32 x) { return __uint_as_float(x << 16); }
DEVICE float high_half(u32 x) { return __uint_as_float(x & 0xFFFF0000u); }

DEVICE float silu(float x) {
  return divide(x, __fadd_rn(exp2_plain(__fmul_rn(__fsub_rn(0.0f, x), 1.4426950408889634f)), 1.0f));
}

// -- sums of squares in integers (liushui.kernels.triton.common): exact in any order

DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }
DEVICE int square_exponent(u32 top) { return min(274 - static_cast<int>(top >> 23), 250); }
DEVICE i64 scaled_square(float x, u32 top) {
  const float y = __fmul_rn(x, __int_as_float(square_exponent(top) << 23));
  return __float2ll_rz(__fmul_rn(y, y));
}
DEVICE float row_scale(i64 total, u32 top, int size, float eps) {
  const float back = __int_as_float((254 - square_exponent(top)) << 23);
  float mean = __fmul_rn(__fmul_rn(__ll2float_rn(total), back), back);
  if (top >= 0x7F800000u) mean = __int_as_float(0x7FC00000);
  return reciprocal_root(__fadd_rn(divide(mean, static_cast<float>(size)), eps));
}
// Of numbers from 0 to 2^52: halves whose sums fit 32 bits.
DEVICE i64 warp_sum(i64 x) {
  const u32 low = warp_add(static_cast<u32>(x) & 0x3FFFFFFu), high = warp_add(static_cast<u32>(x >> 26));
  return (static_cast<i64>(high) << 26) + low;
}
