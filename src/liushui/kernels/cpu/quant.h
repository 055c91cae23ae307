// Products with integer weights: y[n] = sum over groups g of scale[n, g] * (s[g] * I[n, g]) + minimum[n, g] * t[g],
// where x is about s * q in groups of 32 (q int16, s float), I the exact sum of a group's integer products and t = s
// times the sum of q. Groups are added in order by fused operations, so neither the instruction that forms I nor the
// number of rows can be seen in y. (q of 8 bits costs a small model about 1 % of its perplexity, and is no faster where
// pairs of 16 bits are multiplied as quickly as the weights can be read.)
//
// A panel holds 16 columns: the values of all groups, [group][k / 4][column][k % 4] (in 4 bits: rows k / 4 and
// k / 4 + 4 share a byte), then the scales.
#pragma once
#include "amx.h"
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

// -- x in 16 bits

constexpr float kLargest = 32512.0f;  // 127 * 256: a value is then two bytes, 256 a + b, with a and b in int8

// A group of 16 rows of x. So the instructions for tiles and for single rows both find what they need together.
struct alignas(64) PreparedGroup {
  int16_t values[16][kInnerGroup];  // of each four the first, third, second, fourth: as halves of 16 bits have them
#if defined(LS_TILE_INT8)
  int8_t high[16][kInnerGroup], low[16][kInnerGroup];  // the same values in order, 256 high + low
#endif
  float scale[16];
  int32_t sum[16];
  float shift[16];  // scale * sum
};

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

typedef int16_t vs __attribute__((vector_size(W * 4)));
typedef uint16_t vw __attribute__((vector_size(W * 4)));

// Each four of W numbers of 16 bits: the middle two change places.
LS_INLINE void store_halves(int16_t* to, vi q) {
  typedef int16_t narrow __attribute__((vector_size(W * 2)));
  typedef uint64_t fours __attribute__((vector_size(W * 2)));
  fours v = (fours)__builtin_convertvector(q, narrow);
  const fours change = (v ^ (v >> 16)) & 0xffff0000u;
  v ^= change ^ (change << 16);
  memcpy(to, &v, sizeof v);
}

#if defined(LS_TILE_INT8)
LS_INLINE void store_bytes(PreparedGroup& to, int row, int at, vi q) {
  typedef int8_t vq __attribute__((vector_size(W)));
  const vi high = (q + 128) >> 8;
  const vq first = __builtin_convertvector(high, vq), second = __builtin_convertvector(q - (high << 8), vq);
  memcpy(to.high[row] + at, &first, W);
  memcpy(to.low[row] + at, &second, W);
}
#endif

template <class T>
LS_INLINE void quantise_group(const T* x, long count, PreparedGroup& to, int row) {
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
  const bool usable = most < 0x7f800000 && bound > 1e-33f;  // else all zero, times 0, infinity or NaN
  const float inverse = usable ? kLargest / bound : 0.0f;
  const vi keep = vi{} - (int32_t)usable;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vi sums = {};
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    const vi q = ((vi)(v[i] * inverse + magic) - (vi)magic) & keep;
    store_halves(to.values[row] + i * W, q);
#if defined(LS_TILE_INT8)
    store_bytes(to, row, i * W, q);
#endif
    sums += q;
  }
  const int32_t sum = lanes_add(sums);
  const float scale = most < 0x7f800000 && !usable ? 0.0f : bound / kLargest;
  to.sum[row] = sum;
  to.scale[row] = scale;
  to.shift[row] = scale * (float)sum;
}

template <class T>
void quantise_rows(long k, const T* x, long begin, long end, PreparedGroup* prepared) {
  const long groups = (k + kInnerGroup - 1) / kInnerGroup;
  for (long row = begin; row < end; row++)
    for (long g = 0; g < groups; g++)
      quantise_group(x + (row - begin) * k + g * kInnerGroup, k - g * kInnerGroup, prepared[row / 16 * groups + g],
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

// -- exact sums per column

LS_INLINE vi load_bytes(const void* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

// sum + the products of both halves of 16 bits.
LS_INLINE vi dot2(vi sum, vi w, vi x) {
#if defined(__AVX512VNNI__) && LS_WIDTH == 16
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && LS_WIDTH == 8
  sum += (vi)_mm256_madd_epi16((__m256i)w, (__m256i)x);
  asm("" : "+x"(sum));  // or gcc gathers the products to add them in a tree, far more than there are registers
  return sum;
#elif defined(__SSE2__) && LS_WIDTH == 4
  return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  return sum + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

// A word of four bytes of a column, in halves of 16 bits: of int8 (`kPieces` 2) the first and third, the second and
// fourth; of 4 bits (4) the same of the low and then of the high ones.
template <int kPieces>
LS_INLINE vi piece_of(vi packed, int piece) {
  if (kPieces == 2) return piece == 0 ? (vi)((vs)((vw)packed << 8) >> 8) : (vi)((vs)packed >> 8);
  const vw shifted = piece == 0 ? (vw)packed : (vw)packed >> (piece == 1 ? 8 : piece == 2 ? 4 : 12);
  return piece == 3 ? (vi)shifted : (vi)shifted & 0x000f000f;
}

// -- few rows

typedef int32_t __attribute__((may_alias)) word;  // two values of x

// How a format is held, for the kernels: 4 bits (less `kOffset`) or int8; scales are float16 beside each other (with
// minima: alternating), or have been expanded to float before.
template <bool nibbles, int offset, int group, bool minimum, bool direct>
struct Held {
  static constexpr bool kNibbles = nibbles, kMinimum = minimum, kDirect = direct;
  static constexpr int kGroup = group, kOffset = offset;
  static constexpr long kValueBytes = nibbles ? 256 : 512;
};

constexpr long kAhead = 10240;  // bytes between what is fetched and what is multiplied (measured on Zen 3)

struct QuantPanel {
  const uint8_t* values;
  const uint16_t* halves;  // the scales, for formats that use them directly
  long groups, panel_bytes;
  const float *scales, *minima;  // for the others
};

// R rows times V vectors of columns of one panel, from column `column` on.
template <class F, int R, int V>
LS_INLINE void quant_tile(const PreparedGroup* x, int row, const QuantPanel& p, int column, float* out) {
  constexpr int kPieces = F::kNibbles ? 4 : 2, kParts = kInnerGroup / F::kGroup;
  constexpr int kLoads = F::kGroup / 2 / kPieces;  // vectors of the weight, of `kPieces` pairs of k each
  constexpr int kHalves = F::kMinimum ? 32 : 16;   // of a group
  const uint8_t* values = p.values + column * 4;
  const uint16_t* half = p.halves + column;
  vf total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) total[r][c] = vf{};
  const uint8_t* ahead = p.values + kAhead;  // values and scales alike
  const long stride = p.panel_bytes / p.groups;
  for (long g = 0; g < p.groups; g++, values += F::kValueBytes, half += kHalves, ahead += stride) {
#pragma GCC unroll 16
    for (int i = 0; i < F::kValueBytes + 64; i += 64) __builtin_prefetch(ahead + i, 0, 3);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; part++) {
      vi sum[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < V; c++) sum[r][c] = F::kOffset ? vi{} - F::kOffset * (vi{} + x[g].sum[row + r]) : vi{};
#pragma GCC unroll 8
      for (int step = 0; step < kLoads; step++) {
#pragma GCC unroll 4
        for (int piece = 0; piece < kPieces; piece++) {
          vi w[V];
#pragma GCC unroll 8
          for (int c = 0; c < V; c++)
            w[c] = piece_of<kPieces>(load_bytes(values + (part * kLoads + step) * 64 + c * W * 4), piece);
          const int pair = part * F::kGroup / 2 + piece / 2 * 8 + 2 * step + piece % 2;
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const vi q = ((const word*)x[g].values[row + r])[pair] + vi{};
#pragma GCC unroll 8
            for (int c = 0; c < V; c++) sum[r][c] = dot2(sum[r][c], w[c], q);
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
          total[r][c] = fma(__builtin_convertvector(sum[r][c], vf) * x[g].scale[row + r], scale, total[r][c]);
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
  constexpr int kAll = 16 / W, kFit = R == 1 ? 4 : LS_REGISTERS / 8, V = kAll < kFit ? kAll : kFit;
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
    const int height = kMany && count >= 8 ? 8 : count >= 4 ? 4 : count;
    if (kMany && height == 8)
      quant_rows<F, kMany ? 8 : 4>(tile, at, p, out);
    else
      (height == 4   ? quant_rows<F, 4>
       : height == 3 ? quant_rows<F, 3>
       : height == 2 ? quant_rows<F, 2>
                     : quant_rows<F, 1>)(tile, at, p, out);
    row += height;
    out += height * 16;
  }
}

using QuantKernel = void (*)(const PreparedGroup*, long, long, const QuantPanel&, float*);

inline QuantKernel quant_kernel(int format) {
  switch (format) {
    case liushui::kInt4: return quant_panel<Held<true, 8, 32, false, true>>;
    case liushui::kInt4Min: return quant_panel<Held<true, 0, 32, true, true>>;
    case liushui::kInt4K: return quant_panel<Held<true, 0, 32, true, false>>;
    case liushui::kInt6K: return quant_panel<Held<false, 0, 16, false, false>>;
    default: return quant_panel<Held<false, 0, 32, false, true>>;
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
