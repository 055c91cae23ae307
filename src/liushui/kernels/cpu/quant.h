// Products with integer weights: y[n] = sum over groups g of scale[n, g] * (s[g] * I[n, g]) + minimum[n, g] * t[g],
// where x is about s * q in groups of 32 (q int8, s float), I the exact sum of a group's integer products and t = s
// times the sum of q. Groups are added in order by fused operations, so neither the instruction that forms I nor the
// number of rows can be seen in y.
//
// A panel holds 16 columns: the values of all groups, [group][k / 4][column][k % 4] (in 4 bits: rows k / 4 and
// k / 4 + 4 share a byte), then the scales.
#pragma once
#include "product.h"

namespace {

struct Format {
  bool nibbles;          // 4 bits, else int8
  int offset;            // taken off the values of 4 bits
  int group;             // values that share a scale
  bool minimum;          // whether there are minima
  long value_bytes;      // of 32 rows of k in a panel
  long scale_bytes;      // of a panel, per 256 (superblocks) or 32 values of k
  long scale_block;
};

inline Format format_of(int format) {
  switch (format) {
    case liushui::kInt4: return {true, 8, 32, false, 256, 32, 32};
    case liushui::kInt4Min: return {true, 0, 32, true, 256, 64, 32};
    case liushui::kInt4K: return {true, 0, 32, true, 256, 64 + 8 * 32, 256};
    case liushui::kInt6K: return {false, 0, 16, false, 512, 32 + 16 * 16, 256};
    default: return {false, 0, 32, false, 512, 32, 32};
  }
}

inline long groups_of(const PackedWeight& w) { return (w.k + kInnerGroup - 1) / kInnerGroup; }
inline long quant_panel_bytes(const PackedWeight& w) {
  const Format f = format_of(w.format);
  const long groups = groups_of(w), blocks = (groups * kInnerGroup + f.scale_block - 1) / f.scale_block;
  return groups * f.value_bytes + round_up(blocks * f.scale_bytes, 64);
}

// -- x in int8

// A group of 16 rows of x. So the instructions for tiles and for single rows both find what they need together.
struct alignas(64) PreparedGroup {
  int8_t values[16][kInnerGroup];
  float scale[16];
  int32_t sums[2][16];  // of the first and the second 16 values
  float shift[16];      // scale * sum
};
static_assert(sizeof(PreparedGroup) == 768, "48 bytes a row");

// Largest and sum of the lanes.
#if defined(__AVX512F__) && LS_WIDTH == 16
LS_INLINE int32_t lanes_max(vi v) { return _mm512_reduce_max_epi32((__m512i)v); }
LS_INLINE int32_t lanes_add(vi v) { return _mm512_reduce_add_epi32((__m512i)v); }
#elif defined(__AVX2__) && LS_WIDTH == 8
LS_INLINE int32_t lanes_max(vi v) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
LS_INLINE int32_t lanes_add(vi v) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
#else
LS_INLINE int32_t lanes_max(vi v) {
  int32_t most = v[0];
  for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
  return most;
}
LS_INLINE int32_t lanes_add(vi v) {
  int32_t total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}
#endif

template <class T>
LS_INLINE void quantise_group(const T* x, long count, PreparedGroup& to, int row) {
  typedef int8_t vq __attribute__((vector_size(W)));
  constexpr int kVectors = kInnerGroup / W;
  vf v[kVectors];
  vi largest = {};
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    const long left = count - i * W;
    v[i] = left >= W ? load(x + i * W) : left > 0 ? load_n(x + i * W, left) : vf{};
    const vi magnitude = (vi)v[i] & 0x7fffffff;  // as integers they are in order, infinity and NaN at the end
    const vi larger = magnitude > largest;
    largest = (magnitude & larger) | (largest & ~larger);
  }
  const int32_t most = lanes_max(largest);
  float bound;
  memcpy(&bound, &most, 4);
  const bool usable = most < 0x7f800000 && bound > 1e-35f;  // else all zero, times 0, infinity or NaN
  const float inverse = usable ? 127.0f / bound : 0.0f;
  const vi keep = vi{} - (int32_t)usable;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vi sums[2] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    const vi q = ((vi)(v[i] * inverse + magic) - (vi)magic) & keep;
    const vq bytes = __builtin_convertvector(q, vq);
    memcpy(to.values[row] + i * W, &bytes, W);
    sums[i * W / 16] += q;
  }
  const int32_t first = lanes_add(sums[0]), second = lanes_add(sums[1]);
  to.sums[0][row] = first, to.sums[1][row] = second;
  const float scale = most < 0x7f800000 && !usable ? 0.0f : bound / 127.0f;
  to.scale[row] = scale;
  to.shift[row] = scale * (float)(first + second);
}

template <class T>
void quantise_rows(long k, const T* x, long begin, long end, PreparedGroup* prepared) {
  const long groups = (k + kInnerGroup - 1) / kInnerGroup;
  for (long row = begin; row < end; row++)
    for (long g = 0; g < groups; g++)
      quantise_group(x + row * k + g * kInnerGroup, k - g * kInnerGroup, prepared[row / 16 * groups + g],
                     (int)(row % 16));
}

// -- scales

// W float16 numbers.
#if defined(__AVX512F__) && LS_WIDTH == 16
LS_INLINE vf load_half(const uint16_t* p) {
  return (vf)_mm512_maskz_cvtph_ps((__mmask16)0xffff, _mm256_loadu_si256((const __m256i*)p));
}
#elif defined(__F16C__)
LS_INLINE vf load_half(const uint16_t* p) {
  vf v;
  for (int i = 0; i < W / 8; i++) {
    const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
    memcpy((char*)&v + i * 32, &eight, 32);
  }
  return v;
}
#else
LS_INLINE vf load_half(const uint16_t* p) {
  uint32_t lanes[W];
  for (int i = 0; i < W; i++) {  // exponent and mantissa moved; the product with 2^112 sets subnormal ones right
    const uint32_t rest = p[i] & 0x7fffu, sign = (uint32_t)(p[i] & 0x8000u) << 16;
    uint32_t bits = rest << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    memcpy(&bits, &value, 4);
    if (rest >= 0x7c00u) bits = 0x7f800000u | (rest << 13);
    lanes[i] = bits | sign;
  }
  vf v;
  memcpy(&v, lanes, sizeof v);
  return v;
}
#endif

LS_INLINE void halves(const uint16_t* p, float* out) {  // 16 of them
  for (int i = 0; i < 16; i += W) store(out + i, load_half(p + i));
}

// W small integers as floats.
template <class T>
LS_INLINE vf load_small(const T* p) {
  typedef T vs __attribute__((vector_size(W)));
  vs v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vf);
}

// Scales (and minima) of a panel, [group][16]. A minimum is what is added to the value.
inline void expand_scales(int format, const uint8_t* from, long groups, float* scales, float* minima) {
  if (format == liushui::kInt8 || format == liushui::kInt4) {
    for (long g = 0; g < groups; g++) halves((const uint16_t*)from + g * 16, scales + g * 16);
  } else if (format == liushui::kInt4Min) {
    for (long g = 0; g < groups; g++) {
      halves((const uint16_t*)from + g * 32, scales + g * 16);
      halves((const uint16_t*)from + g * 32 + 16, minima + g * 16);
    }
  } else if (format == liushui::kInt4K) {
    for (long g = 0; g < groups; g++) {
      const uint8_t* block = from + g / 8 * (64 + 8 * 32);
      const uint8_t* factors = block + 64 + g % 8 * 32;
      for (int c = 0; c < 16; c += W) {
        store(scales + g * 16 + c, load_half((const uint16_t*)block + c) * load_small(factors + c));
        store(minima + g * 16 + c, -(load_half((const uint16_t*)block + 16 + c) * load_small(factors + 16 + c)));
      }
    }
  } else {
    for (long g = 0; g < 2 * groups; g++) {
      const uint8_t* block = from + g / 16 * (32 + 16 * 16);
      const int8_t* factors = (const int8_t*)block + 32 + g % 16 * 16;
      for (int c = 0; c < 16; c += W)
        store(scales + g * 16 + c, load_half((const uint16_t*)block + c) * load_small(factors + c));
    }
  }
}

// -- exact sums of four products per column

LS_INLINE vi load_bytes(const void* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Of 4-bit values 0 .. 15 (`Nibbles`) and of int8 (`Bytes`): begin, add steps of 4 values of k, finish. `correction`
// is what must be taken off the values of this group, times the sum of q.
#if (defined(__AVX512VNNI__) || defined(LS_EMULATE)) && LS_WIDTH == 16
#if defined(LS_EMULATE)
LS_INLINE vi dot4(vi sum, vi w, vi x) {
  uint8_t a[64];
  int8_t b[64];
  memcpy(a, &w, 64);
  memcpy(b, &x, 64);
  for (int c = 0; c < 16; c++)
    for (int i = 0; i < 4; i++) sum[c] += (int)a[4 * c + i] * (int)b[4 * c + i];
  return sum;
}
#else
LS_INLINE vi dot4(vi sum, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
#endif
struct Nibbles {
  typedef vi Sum;
  static constexpr bool kIsNibbles = true;
  static constexpr int kOffset = 0;
  static LS_INLINE vi of(vi w) { return w; }
  static LS_INLINE vi add(vi sum, vi w, vi x) { return dot4(sum, w, x); }
  static LS_INLINE vi finish(vi sum) { return sum; }
};
struct Bytes : Nibbles {
  static constexpr bool kIsNibbles = false;
  static constexpr int kOffset = 128;
  static LS_INLINE vi of(vi w) { return w ^ (int32_t)0x80808080u; }
};
#elif defined(__AVX2__)
struct Nibbles {  // eight products of at most 15 * 127, two by two, stay within 16 bits
  typedef vi Sum;
  static constexpr bool kIsNibbles = true;
  static constexpr int kOffset = 0;
  static LS_INLINE vi of(vi w) { return w; }
  static LS_INLINE vi add(vi sum, vi w, vi x) {
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
  }
  static LS_INLINE vi finish(vi sum) { return (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
};
struct Bytes {  // |w| <= 128 times sign(w) x, |x| <= 127: two products stay within 16 bits
  typedef vi Sum;
  static constexpr bool kIsNibbles = false;
  static constexpr int kOffset = 0;
  static LS_INLINE vi of(vi w) { return w; }
  static LS_INLINE vi add(vi sum, vi w, vi x) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static LS_INLINE vi finish(vi sum) { return sum; }
};
#else
struct Bytes {
  typedef vi Sum;
  static constexpr bool kIsNibbles = false;
  static constexpr int kOffset = 0;
  static LS_INLINE vi of(vi w) { return w; }
  static LS_INLINE vi add(vi sum, vi w, vi x) {
    for (int shift = 24; shift >= 0; shift -= 8) sum += ((w << shift) >> 24) * ((x << shift) >> 24);
    return sum;
  }
  static LS_INLINE vi finish(vi sum) { return sum; }
};
struct Nibbles : Bytes {
  static constexpr bool kIsNibbles = true;
};
#endif

// -- few rows

typedef int32_t __attribute__((may_alias)) word;  // four values of x

// How a format is held, for the kernels: `Kind` multiplies its values; `kOffset` is taken off 4-bit ones; scales are
// float16 beside each other (with minima: alternating), or have been expanded to float before.
template <class K, int offset, int group, bool minimum, bool direct>
struct Held {
  typedef K Kind;
  static constexpr bool kNibbles = K::kIsNibbles, kMinimum = minimum, kDirect = direct;
  static constexpr int kGroup = group, kOffset = offset + K::kOffset;
  static constexpr long kValueBytes = kNibbles ? 256 : 512;
};

struct QuantPanel {
  const uint8_t* values;
  const uint16_t* halves;  // the scales, for formats that use them directly
  long groups, panel_bytes;
  const float *scales, *minima;  // for the others
};

// R rows times V vectors of columns of one panel, from column `column` on.
template <class F, int R, int V>
LS_INLINE void quant_tile(const PreparedGroup* x, int row, const QuantPanel& p, int column, float* out) {
  typedef typename F::Kind Kind;
  constexpr int kSteps = F::kGroup / 4, kParts = kInnerGroup / F::kGroup, kLoads = F::kNibbles ? kSteps / 2 : kSteps;
  constexpr int kHalves = F::kMinimum ? 32 : 16;  // of a group
  const uint8_t* values = p.values + column * 4;
  const uint16_t* half = p.halves + column;
  vf total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) total[r][c] = vf{};
  for (long g = 0; g < p.groups; g++, values += F::kValueBytes, half += kHalves) {
#pragma GCC unroll 8
    for (int i = 0; i < F::kValueBytes; i += 64) __builtin_prefetch(values + 10 * F::kValueBytes + i, 0, 3);
    if (F::kDirect) __builtin_prefetch((const char*)half + p.panel_bytes, 0, 2);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; part++) {
      typename Kind::Sum sum[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < V; c++) sum[r][c] = typename Kind::Sum{};
#pragma GCC unroll 8
      for (int step = 0; step < kLoads; step++) {
#pragma GCC unroll 8
        for (int c = 0; c < V; c++) {
          const vi packed = load_bytes(values + (part * kSteps + step) * 64 + c * W * 4);
          const vi low = F::kNibbles ? packed & 0x0f0f0f0f : Kind::of(packed);
          const vi high = (packed >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const word* q = (const word*)x[g].values[row + r] + part * kSteps;
            sum[r][c] = Kind::add(sum[r][c], low, q[step] + vi{});
            if (F::kNibbles) sum[r][c] = Kind::add(sum[r][c], high, q[step + kLoads] + vi{});
          }
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < V; c++) {
        const long at = (g * kParts + part) * 16 + column + c * W;
        const vf scale = F::kDirect ? load_half(half + c * W) : load(p.scales + at);
        const vf minimum = !F::kMinimum ? vf{} : F::kDirect ? load_half(half + 16 + c * W) : load(p.minima + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          vi exact = Kind::finish(sum[r][c]);
          if (F::kOffset) {
            const int32_t *first = x[g].sums[0] + row + r, *second = x[g].sums[1] + row + r;
            exact -= F::kOffset * (kParts == 2 ? x[g].sums[part][row + r] : *first + *second);
          }
          total[r][c] = fma(__builtin_convertvector(exact, vf) * x[g].scale[row + r], scale, total[r][c]);
          if (F::kMinimum) total[r][c] = fma(splat(x[g].shift[row + r]), minimum, total[r][c]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) store(out + r * 16 + column + c * W, total[r][c]);
}

// R rows times all 16 columns: as many vectors of columns at a time as the registers hold.
template <class F, int R>
void quant_rows(const PreparedGroup* x, int row, const QuantPanel& p, float* out) {
  constexpr int kAll = 16 / W;
  constexpr int V = R == 1 ? (kAll < 4 ? kAll : 4) : LS_REGISTERS == 16 && R == 2 ? (kAll < 2 ? kAll : 2) : 1;
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += V * W) quant_tile<F, R, V>(x, row, p, c, out);
}

// Rows [begin, end) times one panel -> out [rows, 16].
template <class F>
void quant_panel(const PreparedGroup* x, long begin, long end, const QuantPanel& p, float* out) {
  constexpr bool kMany = LS_REGISTERS == 32;
  for (long row = begin; row < end;) {
    const int at = (int)(row % 16), count = (int)min_of(16 - at, end - row);
    const PreparedGroup* tile = x + row / 16 * p.groups;
    const int height = kMany && count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
    if (kMany && height == 8)
      quant_rows<F, kMany ? 8 : 4>(tile, at, p, out);
    else
      (height == 4 ? quant_rows<F, 4> : height == 2 ? quant_rows<F, 2> : quant_rows<F, 1>)(tile, at, p, out);
    row += height;
    out += height * 16;
  }
}

using QuantKernel = void (*)(const PreparedGroup*, long, long, const QuantPanel&, float*);

inline QuantKernel quant_kernel(int format) {
  switch (format) {
    case liushui::kInt4: return quant_panel<Held<Nibbles, 8, 32, false, true>>;
    case liushui::kInt4Min: return quant_panel<Held<Nibbles, 0, 32, true, true>>;
    case liushui::kInt4K: return quant_panel<Held<Nibbles, 0, 32, true, false>>;
    case liushui::kInt6K: return quant_panel<Held<Bytes, 0, 16, false, false>>;
    default: return quant_panel<Held<Bytes, 0, 32, false, true>>;
  }
}

inline bool scales_direct(int format) { return format != liushui::kInt4K && format != liushui::kInt6K; }

constexpr long kQuantRows = 128;  // rows that pass over a panel while it is in the cache

inline void quant_multiply(const PackedWeight& w, const PreparedGroup* x, long rows, long first_column,
                           const Output& out, int worker, int workers) {
  const Format f = format_of(w.format);
  const long groups = groups_of(w), panels = (w.n + kColumns - 1) / kColumns, bytes = quant_panel_bytes(w);
  const long row_blocks = (rows + kQuantRows - 1) / kQuantRows, count = groups * (kInnerGroup / f.group) * kColumns;
  float* scales = (float*)liushui::scratch(liushui::kProduct,
                                           (size_t)(2 * count + kQuantRows * kColumns) * sizeof(float));
  float *minima = scales + count, *y = minima + count;
  const QuantKernel kernel = quant_kernel(w.format);
  const Share share = share_of(panels * row_blocks, worker, workers);
  for (long unit = share.begin; unit < share.end; unit++) {
    const long panel = unit / row_blocks, row = unit % row_blocks * kQuantRows, end = min_of(rows, row + kQuantRows);
    const uint8_t* values = (const uint8_t*)w.data + panel * bytes;
    const uint8_t* held = values + groups * f.value_bytes;
    if (!scales_direct(w.format)) expand_scales(w.format, held, groups, scales, minima);
    kernel(x, row, end, QuantPanel{values, (const uint16_t*)held, groups, bytes, scales, minima}, y);
    const long column = panel * kColumns;
    emit_rows(out, w.bias ? w.bias + column : nullptr, worker, row, end - row, first_column + column,
              min_of(kColumns, w.n - column), y, kColumns);
  }
}

}  // namespace
