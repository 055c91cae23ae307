// For tests alone: the vector instructions that only kernels for bfloat16 use, AMX's among them (AVX512-BW, -VBMI,
// -BF16), in software, so that these kernels run as they are on any machine. Names and semantics are those of Intel's
// Intrinsics Guide; places are counted from the lowest, and a lane is a quarter of a register.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512BW__ 1
#define __AVX512VBMI__ 1
#define __AVX512BF16__ 1

// Not inlined a hundred times: the tests wait for the compiler.
#define LS_OUT_OF_LINE __attribute__((noinline, unused)) static

namespace {
namespace soft {

template <class T, int kBytes = 64>
struct Register {
  static constexpr int kCount = kBytes / (int)sizeof(T);
  T at[kCount];

  Register() : at() {}
  template <class V>
  Register(const V& v) {
    static_assert(sizeof v == kBytes, "a register");
    memcpy(at, &v, kBytes);
  }
  template <class V>
  V as() const {
    static_assert(sizeof(V) == kBytes, "a register");
    V v;
    memcpy(&v, at, kBytes);
    return v;
  }
  operator __m512i() const { return as<__m512i>(); }
  T& operator[](int i) { return at[i]; }
  T operator[](int i) const { return at[i]; }
};
typedef Register<uint8_t> Bytes;
typedef Register<uint16_t> Words;
typedef Register<uint32_t> Doubles;
typedef Register<uint64_t> Quads;

// Place by place.
template <class R, class F>
R each(F value) {
  R out;
  for (int i = 0; i < R::kCount; i++) out[i] = value(i);
  return out;
}

// In every lane: a value of a, then one of b, from its lower (upper) half.
template <class R>
R unpacked(const R& a, const R& b, bool upper) {
  const int lane = R::kCount / 4;
  return each<R>([&](int i) {
    const int from = i / lane * lane + i % lane / 2 + (upper ? lane / 2 : 0);
    return i % 2 ? b[from] : a[from];
  });
}

// To nearest, ties to even; subnormal numbers are zero, what is not a number stays so.
inline uint16_t bfloat16_of(uint32_t x) {
  if ((x & 0x7f800000u) == 0) return (uint16_t)(x >> 16 & 0x8000u);
  if ((x & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(x >> 16 | 0x40u);
  return (uint16_t)((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}

LS_OUT_OF_LINE Words cvtne2ps_pbh(const Doubles& high, const Doubles& low) {
  return each<Words>([&](int i) { return bfloat16_of(i < 16 ? low[i] : high[i - 16]); });
}
LS_OUT_OF_LINE __m256i cvtneps_pbh(const Doubles& v) {
  Register<uint16_t, 32> out;
  for (int i = 0; i < 16; i++) out[i] = bfloat16_of(v[i]);
  return out.as<__m256i>();
}
LS_OUT_OF_LINE Doubles cvtepu16_epi32(const Register<uint16_t, 32>& v) {
  return each<Doubles>([&](int i) { return (uint32_t)v[i]; });
}
LS_OUT_OF_LINE Doubles cvtps_epi32(const Register<float>& v) {
  return each<Doubles>([&](int i) { return (uint32_t)_mm_cvtss_si32(_mm_set_ss(v[i])); });
}
LS_OUT_OF_LINE Doubles slli_epi32(const Doubles& v, int count) {
  return each<Doubles>([&](int i) { return v[i] << count; });
}
LS_OUT_OF_LINE Words srli_epi16(const Words& v, int count) {
  return each<Words>([&](int i) { return (uint16_t)(v[i] >> count); });
}
LS_OUT_OF_LINE Words subs_epu16(const Words& a, const Words& b) {
  return each<Words>([&](int i) { return (uint16_t)(a[i] > b[i] ? a[i] - b[i] : 0); });
}
LS_OUT_OF_LINE Words packus_epi32(const Register<int32_t>& a, const Register<int32_t>& b) {
  return each<Words>([&](int i) {
    const int32_t x = (i % 8 < 4 ? a : b)[i / 8 * 4 + i % 4];
    return (uint16_t)(x < 0 ? 0 : x > 65535 ? 65535 : x);
  });
}

LS_OUT_OF_LINE Words permutexvar_epi16(const Words& from, const Words& v) {
  return each<Words>([&](int i) { return v[from[i] & 31]; });
}
LS_OUT_OF_LINE Words permutex2var_epi16(const Words& a, const Words& from, const Words& b) {
  return each<Words>([&](int i) { return (from[i] & 32 ? b : a)[from[i] & 31]; });
}
LS_OUT_OF_LINE Bytes maskz_permutexvar_epi8(uint64_t mask, const Bytes& from, const Bytes& v) {
  return each<Bytes>([&](int i) { return (uint8_t)(mask >> i & 1 ? v[from[i] & 63] : 0); });
}
LS_OUT_OF_LINE Bytes mask_shuffle_epi8(const Bytes& otherwise, uint64_t mask, const Bytes& v, const Bytes& from) {
  return each<Bytes>([&](int i) {
    if (!(mask >> i & 1)) return otherwise[i];
    return (uint8_t)(from[i] & 0x80 ? 0 : v[i / 16 * 16 + (from[i] & 15)]);
  });
}
LS_OUT_OF_LINE Bytes multishift_epi64_epi8(const Bytes& from, const Quads& v) {
  return each<Bytes>([&](int i) {
    const uint64_t x = v[i / 8], shift = from[i] & 63;
    return (uint8_t)(shift ? x >> shift | x << (64 - shift) : x);
  });
}
LS_OUT_OF_LINE Doubles ternarylogic_epi32(const Doubles& a, const Doubles& b, const Doubles& c, int table) {
  return each<Doubles>([&](int i) {
    uint32_t out = 0;
    for (int bit = 0; bit < 32; bit++) {
      const uint32_t row = (a[i] >> bit & 1) << 2 | (b[i] >> bit & 1) << 1 | (c[i] >> bit & 1);
      out |= ((uint32_t)table >> row & 1) << bit;
    }
    return out;
  });
}
LS_OUT_OF_LINE Quads shuffle_i64x2(const Quads& a, const Quads& b, int from) {
  return each<Quads>([&](int i) { return (i < 4 ? a : b)[(from >> i / 2 * 2 & 3) * 2 + i % 2]; });
}
LS_OUT_OF_LINE Doubles inserti32x4(Doubles v, const Register<uint32_t, 16>& lane, int at) {
  for (int i = 0; i < 4; i++) v[at * 4 + i] = lane[i];
  return v;
}
LS_OUT_OF_LINE Doubles mask_broadcast_i32x4(const Doubles& otherwise, uint32_t mask,
                                            const Register<uint32_t, 16>& lane) {
  return each<Doubles>([&](int i) { return mask >> i & 1 ? lane[i % 4] : otherwise[i]; });
}
LS_OUT_OF_LINE Doubles broadcast_i64x4(const Register<uint32_t, 32>& half) {
  return each<Doubles>([&](int i) { return half[i % 8]; });
}
LS_OUT_OF_LINE Doubles shuffle_epi32(const Doubles& v, int from) {
  return each<Doubles>([&](int i) { return v[i / 4 * 4 + (from >> i % 4 * 2 & 3)]; });
}
LS_OUT_OF_LINE Doubles broadcast_i32x4(const Register<uint32_t, 16>& lane) {
  return each<Doubles>([&](int i) { return lane[i % 4]; });
}

inline float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&x, &bits, 4);
  return x;
}

inline float widened(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return flushed(value);
}

// The odd terms and then the even ones, fused, subnormals as zero (Software Developer's Manual, volume 2, VDPBF16PS).
LS_OUT_OF_LINE __m512 dpbf16_ps(const Register<float>& sum, const Words& a, const Words& b) {
  return each<Register<float>>([&](int i) {
           const float odd = __builtin_fmaf(widened(a[2 * i + 1]), widened(b[2 * i + 1]), flushed(sum[i]));
           return flushed(__builtin_fmaf(widened(a[2 * i]), widened(b[2 * i]), flushed(odd)));
         })
      .as<__m512>();
}

template <class R, class T>
R set1(T value) {
  return each<R>([&](int) { return value; });
}
template <class... T>
Doubles set_epi32(T... values) {  // the highest first
  const uint32_t all[16] = {(uint32_t)values...};
  return each<Doubles>([&](int i) { return all[15 - i]; });
}
LS_OUT_OF_LINE __m512i loaded(const void* from) {
  Bytes v;
  memcpy(v.at, from, 64);
  return v;
}
LS_OUT_OF_LINE void stored(void* to, const Bytes& v) { memcpy(to, v.at, 64); }

}  // namespace soft
}  // namespace

#define _mm512_loadu_si512(p) soft::loaded(p)
#define _mm512_load_si512(p) soft::loaded(p)
#define _mm512_storeu_si512(p, v) soft::stored(p, v)
#define _mm512_set1_epi8(x) ((__m512i)soft::set1<soft::Bytes>((uint8_t)(x)))
#define _mm512_set1_epi16(x) ((__m512i)soft::set1<soft::Words>((uint16_t)(x)))
#define _mm512_set1_epi32(x) ((__m512i)soft::set1<soft::Doubles>((uint32_t)(x)))
#define _mm512_set1_epi64(x) ((__m512i)soft::set1<soft::Quads>((uint64_t)(x)))
#define _mm512_set_epi32(...) ((__m512i)soft::set_epi32(__VA_ARGS__))
#define _mm512_castsi128_si512(v) ((__m512i)soft::inserti32x4(soft::Doubles(), v, 0))
#define _mm512_inserti32x4(v, lane, at) ((__m512i)soft::inserti32x4(v, lane, at))
#define _mm512_broadcast_i32x4(v) ((__m512i)soft::broadcast_i32x4(v))
#define _mm512_mask_broadcast_i32x4(v, mask, lane) ((__m512i)soft::mask_broadcast_i32x4(v, mask, lane))
#define _mm512_broadcast_i64x4(v) ((__m512i)soft::broadcast_i64x4(v))
#define _mm512_shuffle_epi32(v, from) ((__m512i)soft::shuffle_epi32(v, from))
#define _mm512_dpbf16_ps(sum, a, b) soft::dpbf16_ps(sum, a, b)
#define _mm512_cvtne2ps_pbh(a, b) ((__m512i)soft::cvtne2ps_pbh(a, b))
#define _mm512_cvtneps_pbh(v) soft::cvtneps_pbh(v)
#define _mm512_cvtepu16_epi32(v) ((__m512i)soft::cvtepu16_epi32(v))
#define _mm512_cvtps_epi32(v) ((__m512i)soft::cvtps_epi32(v))
#define _mm512_slli_epi32(v, n) ((__m512i)soft::slli_epi32(v, n))
#define _mm512_srli_epi16(v, n) ((__m512i)soft::srli_epi16(v, n))
#define _mm512_subs_epu16(a, b) ((__m512i)soft::subs_epu16(a, b))
#define _mm512_packus_epi32(a, b) ((__m512i)soft::packus_epi32(a, b))
#define _mm512_permutexvar_epi16(from, v) ((__m512i)soft::permutexvar_epi16(from, v))
#define _mm512_permutex2var_epi16(a, from, b) ((__m512i)soft::permutex2var_epi16(a, from, b))
#define _mm512_permutexvar_epi8(from, v) ((__m512i)soft::maskz_permutexvar_epi8(~0ull, from, v))
#define _mm512_maskz_permutexvar_epi8(mask, from, v) ((__m512i)soft::maskz_permutexvar_epi8(mask, from, v))
#define _mm512_mask_shuffle_epi8(v, mask, a, from) ((__m512i)soft::mask_shuffle_epi8(v, mask, a, from))
#define _mm512_multishift_epi64_epi8(from, v) ((__m512i)soft::multishift_epi64_epi8(from, v))
#define _mm512_ternarylogic_epi32(a, b, c, table) ((__m512i)soft::ternarylogic_epi32(a, b, c, table))
#define _mm512_shuffle_i64x2(a, b, from) ((__m512i)soft::shuffle_i64x2(a, b, from))
#define _mm512_unpacklo_epi16(a, b) ((__m512i)soft::unpacked<soft::Words>(a, b, false))
#define _mm512_unpackhi_epi16(a, b) ((__m512i)soft::unpacked<soft::Words>(a, b, true))
#define _mm512_unpacklo_epi32(a, b) ((__m512i)soft::unpacked<soft::Doubles>(a, b, false))
#define _mm512_unpackhi_epi32(a, b) ((__m512i)soft::unpacked<soft::Doubles>(a, b, true))
#define _mm512_unpacklo_epi64(a, b) ((__m512i)soft::unpacked<soft::Quads>(a, b, false))
#define _mm512_unpackhi_epi64(a, b) ((__m512i)soft::unpacked<soft::Quads>(a, b, true))
