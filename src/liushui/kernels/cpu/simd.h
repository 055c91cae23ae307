// Vectors of float, one width per instruction set. Everything is in an unnamed namespace and takes no template
// from the standard library: this header is compiled once per instruction set, and a function shared between
// those objects could be linked from the wrong one.
//
// Contraction is off (-ffp-contract=off) and there is no -ffast-math: an operation is fused only where `fma`
// says so. So the same element gives the same bits in every tile, lane and tail.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(LS_EMULATE_AMX) || defined(LS_EMULATE_BF16)
#include "emulate_vectors.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef LS_WIDTH
#if defined(__AVX512F__)
#define LS_WIDTH 16
#elif defined(__AVX2__)
#define LS_WIDTH 8
#else
#define LS_WIDTH 4
#endif
#endif

#ifndef LS_REGISTERS
#if defined(__AVX512F__) || defined(__aarch64__)
#define LS_REGISTERS 32
#else
#define LS_REGISTERS 16
#endif
#endif

#define LS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int W = LS_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

LS_INLINE long min_of(long a, long b) { return a < b ? a : b; }
LS_INLINE long max_of(long a, long b) { return a > b ? a : b; }
LS_INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

LS_INLINE vf splat(float x) { return x - (vf){}; }

LS_INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// Whether any bit is set.
LS_INLINE bool any(vi v) {
#if defined(__AVX512F__) && LS_WIDTH == 16
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__) && LS_WIDTH == 8
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int32_t all = 0;
  for (int i = 0; i < W; i++) all |= v[i];
  return all != 0;
#endif
}

LS_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__) && LS_WIDTH == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && LS_WIDTH == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(LS_EMULATE) && LS_WIDTH == 16
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(z, &c, sizeof z);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, sizeof z);
  return c;
#elif defined(__aarch64__) && LS_WIDTH == 4
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The second where they are equal, or one is not a number.
LS_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__) && LS_WIDTH == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && LS_WIDTH == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

LS_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

LS_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__) && LS_WIDTH == 16  // gcc 12 would widen it in pieces
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && LS_WIDTH == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

LS_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// As bfloat16: to nearest, ties to even; NaN stays NaN.
LS_INLINE vh narrowed(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (vu)(v != v);
  return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vh);
}

// Likewise, but the instruction takes subnormals as zero.
LS_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__) && LS_WIDTH == 16
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vh h = narrowed(v);
  memcpy(p, &h, sizeof h);
#endif
}

// v as it is read again after it has been stored as a T.
template <class T>
LS_INLINE vf rounded(vf v) {
  T once[W];
  store(once, v);
  return load(once);
}
#if defined(__AVX512BF16__) && LS_WIDTH == 16
template <>
LS_INLINE vf rounded<bf16>(vf v) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
}
#endif

// The first n < W elements; the other lanes are zero.
template <class T>
LS_INLINE vf load_n(const T* p, long n) {
  T buffer[W];
  memset((void*)buffer, 0, sizeof buffer);
  memcpy((void*)buffer, p, (size_t)n * sizeof(T));
  return load(buffer);
}

template <class T>
LS_INLINE void store_n(T* p, vf v, long n) {
  T buffer[W];
  store(buffer, v);
  memcpy((void*)p, buffer, (size_t)n * sizeof(T));
}

// All of a vector, or its first n elements where fewer than W are left.
template <class T>
LS_INLINE vf load_up_to(const T* p, long n) {
  return n >= W ? load(p) : load_n(p, n);
}

template <class T>
LS_INLINE void store_up_to(T* p, vf v, long n) {
  if (n >= W)
    store(p, v);
  else
    store_n(p, v, n);
}

// Calls each(i, n) for vectors from i on, n elements of each: W of all but the last.
template <class Each>
LS_INLINE void each_vector(long from, long to, const Each& each) {
  for (; from + W <= to; from += W) each(from, (long)W);
  if (from < to) each(from, to - from);
}

// Sum of the lanes, halves folded onto each other.
LS_INLINE float lane_sum(vf v) {
#if LS_WIDTH == 16
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  const v8 b = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const v4 c = __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
  return (c[0] + c[2]) + (c[1] + c[3]);
#endif
  float x[W];
  store(x, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

LS_INLINE float lane_max(vf v) {
  float x[W];
  store(x, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

LS_INLINE vf exp_polynomial(vf r) {
  vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  return fma(p, r * r, r) + 1.0f;
}

// e^x within 1 ulp (0 below -87.33, where the result would be subnormal; infinity above 88.73; NaN kept).
// x = n ln 2 + r with |r| <= ln(2)/2 (Cody and Waite), then the Taylor polynomial of degree 7 in r.
LS_INLINE vf vexp(vf x) {
  const float low = -87.33654f, high = 88.72283f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);  // exact: few bits in the constant
  r = fma(n, splat(2.12194440e-4f), r);
  // 2^n in two factors, since n may be 128; multiplied, not added to the exponent, so that NaN survives.
  const vu exponent = (vu)shifted - (vu)magic;
  const vu half = (vu)((vi)exponent >> 1);
  const vf scaled = (exp_polynomial(r) * (vf)((half + 127u) << 23)) * (vf)((exponent - half + 127u) << 23);
  const vf bounded = select(x > splat(high), splat(__builtin_inff()), scaled);
  return select(x < splat(low), splat(0.0f), bounded);
}

// e^x of x <= 0, likewise; cheaper, as 2^n is a normal number.
LS_INLINE vf vexp_of_negative(vf x) {
  const vf magic = splat(12582912.0f);
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  const vf power = (vf)(((vu)shifted << 23) + (127u << 23));  // the integer is in the lowest bits
  return select(x < splat(-87.33654f), splat(0.0f), exp_polynomial(r) * power);
}

// x times the logistic function of y.
LS_INLINE vf times_sigmoid(vf x, vf y) { return x / (1.0f + vexp(-y)); }

// 2^x of x up to 126 within 3e-6, finer than the rounding to bfloat16; 1 of 0, 0 of minus infinity, NaN kept.
LS_INLINE vf power_of_two(vf x) {
  const auto polynomial = [](vf r) {  // minimax on [0, 1] of the relative error, with value 1 at 0
    vf p = splat(0.013426732271909714f);
    p = fma(p, r, splat(0.052242398262023926f));
    p = fma(p, r, splat(0.24128024280071259f));
    p = fma(p, r, splat(0.6930448412895203f));
    return fma(p, r, splat(1.0f));
  };
#if defined(__AVX512DQ__)
  constexpr int kLessFloor = 0x09;  // x - floor(x), quietly; 0 of an infinity
  const vf r = (vf)_mm512_reduce_ps((__m512)x, kLessFloor);
  return (vf)_mm512_scalef_ps((__m512)polynomial(r), (__m512)x);  // times 2^floor(x)
#else
  const vf magic = splat(12582912.0f);
  const vf bounded = select((vi)(x < splat(-200.0f)), splat(-200.0f), x);
  const vf nearest = (bounded + magic) - magic;
  const vf whole = select((vi)(nearest > bounded), nearest - 1.0f, nearest);
  const vf power = (vf)(((vu)(whole + magic) << 23) + (127u << 23));
  return select((vi)(bounded < splat(-126.0f)), splat(0.0f), polynomial(bounded - whole) * power);
#endif
}

// Keys are turned into columns 4 dimensions at a time: `load_columns` makes 4 vectors of Kw keys each.
#if defined(__AVX2__)
constexpr int Kw = 8;
typedef __m256 vk;

LS_INLINE vk load_k(const float* p) { return _mm256_loadu_ps(p); }
LS_INLINE void store_k(float* p, vk v) { _mm256_storeu_ps(p, v); }

// Four elements of one row beside four of another.
LS_INLINE vk load_beside(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
LS_INLINE vk load_beside(const bf16* low, const bf16* high) {
  const __m128i l = _mm_loadl_epi64((const __m128i*)low), h = _mm_loadl_epi64((const __m128i*)high);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_unpacklo_epi64(l, h)), 16));
}

template <class T>
LS_INLINE void load_columns(const T* const* rows, long d, vk* columns) {
  const vk a = load_beside(rows[0] + d, rows[4] + d), b = load_beside(rows[1] + d, rows[5] + d);
  const vk c = load_beside(rows[2] + d, rows[6] + d), e = load_beside(rows[3] + d, rows[7] + d);
  const vk ab = _mm256_unpacklo_ps(a, b), ce = _mm256_unpacklo_ps(c, e);
  const vk ab2 = _mm256_unpackhi_ps(a, b), ce2 = _mm256_unpackhi_ps(c, e);
  columns[0] = _mm256_shuffle_ps(ab, ce, 0x44);
  columns[1] = _mm256_shuffle_ps(ab, ce, 0xee);
  columns[2] = _mm256_shuffle_ps(ab2, ce2, 0x44);
  columns[3] = _mm256_shuffle_ps(ab2, ce2, 0xee);
}
#else
constexpr int Kw = 4;
static_assert(W == Kw, "the baseline has vectors of four");
typedef vf vk;

LS_INLINE vk load_k(const float* p) { return load(p); }
LS_INLINE void store_k(float* p, vk v) { store(p, v); }

template <class T>
LS_INLINE void load_columns(const T* const* rows, long d, vk* columns) {
  const vf v[4] = {load(rows[0] + d), load(rows[1] + d), load(rows[2] + d), load(rows[3] + d)};
#if defined(__x86_64__)
  __m128 a = (__m128)v[0], b = (__m128)v[1], c = (__m128)v[2], e = (__m128)v[3];
  _MM_TRANSPOSE4_PS(a, b, c, e);
  columns[0] = (vk)a, columns[1] = (vk)b, columns[2] = (vk)c, columns[3] = (vk)e;
#elif defined(__aarch64__)
  const float32x4x2_t ab = vtrnq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  const float32x4x2_t ce = vtrnq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
  columns[0] = (vk)vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(ce.val[0]));
  columns[1] = (vk)vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(ce.val[1]));
  columns[2] = (vk)vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(ce.val[0]));
  columns[3] = (vk)vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(ce.val[1]));
#else
  for (int i = 0; i < 4; i++) columns[i] = (vk){v[0][i], v[1][i], v[2][i], v[3][i]};
#endif
}
#endif

LS_INLINE float widen(float x) { return x; }
LS_INLINE float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
