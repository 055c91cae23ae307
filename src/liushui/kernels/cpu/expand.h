// Blocks of integers that are multiplied as bfloat16: how they lie in memory, and their expansion into tiles.
//
// A value is float32's scale * q + minimum, rounded to bfloat16: the weight that dequantising at load would have held,
// bit for bit. Of 4 bits there are 16 different values in a column's group, which are formed once and looked up. (As
// their products with q are exact in float32, one fused operation gives what a product and a sum give.)
//
// A panel holds 32 columns, group after group of 32 values of k; a group: its values, then its scales, then its minima,
// 32 each. Values of 4 bits lie in 8 vectors of 32 words: word i of vector j has value i of columns 4 j to 4 j + 3.
// Those of 8 bits: expand_bytes.h.
//
// Beside tile instructions a core of Sapphire Rapids has one unit for float operations on 512 bits, not two (16 of them
// take 16.5 cycles then, else 8.2), while shuffles, logic and conversion to bfloat16 take what they take without. A lookup
// of words takes that unit, too, one of bytes does not.
#pragma once
#include "amx.h"
#include "expand_bytes.h"
#include "quant_pack.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr int kWide = 32, kHalf = 16;  // columns of a panel, of a tile

inline int plain_format(int format) { return format & ~liushui::kAsBFloat16; }

struct WideLayout {
  long values, group, header;  // bytes of a group's values, of the whole group, and of what leads 8 of them (or 0)

  constexpr long at(long g) const { return header ? header_at(g) + header + g % 8 * group : g * group; }
  constexpr long header_at(long g) const { return g / 8 * (8 * group + header); }
};

constexpr WideLayout wide_layout(int plain) {
  switch (plain) {
    case liushui::kInt4: return {512, 512 + 64, 0};
    case liushui::kInt4Min: return {512, 512 + 128, 0};
    case liushui::kInt4K: return {512, 512 + 64, 128};
    case liushui::kInt6K: return {1024, 1024 + 64, 64};
    default: return {1024, 1024 + 64, 0};
  }
}

// Whether the weight is a product's second factor, pairs of k of 16 columns, and rows of x the first.
constexpr bool weight_second(int plain) { return plain == liushui::kInt8 || plain == liushui::kInt6K; }

inline long wide_panel_bytes(const PackedWeight& w) {
  const WideLayout layout = wide_layout(plain_format(w.format));
  const long groups = groups_of(w);
  return groups * layout.group + (layout.header ? groups / 8 * layout.header : 0);
}

// Where one column's values and scales go.
struct WideColumn {
  uint8_t* panel;
  int column;
  int plain;
  Format format = format_of(plain);
  WideLayout layout = wide_layout(plain);

  void put(long g, const int8_t* q) const {
    uint8_t* to = panel + layout.at(g);
    if (weight_second(plain)) {
      for (int i = 0; i < 32; i++) to[column / 16 * 512 + byte_place(column % 16, i)] = (uint8_t)(q[i] ^ kByteFlip);
      return;
    }
    typedef uint8_t vb __attribute__((vector_size(32)));
    vb bytes;
    vw words;
    to += column / 4 * 64;
    memcpy(&bytes, q, 32), memcpy(&words, to, 64);
    words |= __builtin_convertvector(bytes, vw) << (column % 4 * 4);
    memcpy(to, &words, 64);
  }
  uint8_t* half(long block, int which) const {
    uint8_t* first = layout.header ? panel + block * (8 * layout.group + layout.header)
                                   : panel + block * layout.group + layout.values;
    return first + which * 64 + column * 2;
  }
  uint8_t* factor(long block, int g, int which) const {
    const int part = format.minimum ? which : g % 2;
    return panel + layout.at(block * 8 + (format.minimum ? g : g / 2)) + layout.values + part * 32 + column;
  }
};

inline void wide_pack_panel(const PackedWeight& w, int source, const uint8_t* rows, long row_bytes, long panel,
                            uint8_t* data) {
  const int plain = plain_format(w.format);
  const long bytes = wide_panel_bytes(w);
  uint8_t* to = data + panel * bytes;
  memset(to, 0, (size_t)bytes);
  for (int c = 0; c < kWide && panel * kWide + c < w.n; c++)
    pack_column(w, source, rows + (panel * kWide + c) * row_bytes, row_bytes, WideColumn{to, c, plain});
}

LS_INLINE vw looked_up(vw table, vw index) {  // by the lowest 5 bits
  return (vw)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
}

// -- a group

// Scales [16] (of groups of 16: [2][16]) and what is added [16] of the columns from `c` on, as float32.
template <int kPlain>
LS_INLINE void wide_scales(const uint8_t* group, const uint8_t* header, int c, float* scales, float* minima) {
  const uint8_t* held = group + wide_layout(kPlain).values;
#pragma GCC unroll 2
  for (int i = 0; i < kHalf; i += W, c += W) {
    if constexpr (kPlain == liushui::kInt4K) {
      const vf scale = load_half((const uint16_t*)header + c), minimum = load_half((const uint16_t*)header + 32 + c);
      store(scales + i, scale * load_small(held + c));
      store(minima + i, -(minimum * load_small(held + 32 + c)));
    } else if constexpr (kPlain == liushui::kInt6K) {
      const vf scale = load_half((const uint16_t*)header + c);
      store(scales + i, scale * load_small((const int8_t*)held + c));
      store(scales + kHalf + i, scale * load_small((const int8_t*)held + 32 + c));
    } else {
      store(scales + i, load_half((const uint16_t*)held + c));
      if (kPlain == liushui::kInt4Min) store(minima + i, load_half((const uint16_t*)held + 32 + c));
    }
  }
}

// What an index of bytes is made with: the bits that stay, and those of an even and of an odd column.
struct IndexBits {
  __m512i keep, even, odd;

  // Read from memory: to make them takes the unit that looks up.
  LS_INLINE IndexBits() {
    alignas(64) static constexpr auto kBits = [] {
      struct Lines {
        uint8_t at[3][64];
      } lines = {};
      for (int i = 0; i < 64; i++)
        lines.at[0][i] = 0x1e, lines.at[1][i] = (uint8_t)(i % 2), lines.at[2][i] = (uint8_t)(32 + i % 2);
      return lines;
    }();
    const uint8_t* bits = kBits.at[0];
    asm("" : "+r"(bits));
    keep = _mm512_loadu_si512(bits), even = _mm512_loadu_si512(bits + 64), odd = _mm512_loadu_si512(bits + 128);
  }
};

// Four columns of 4 bits. look_up: the values of one, from a table of two: 16 of an even column, 16 of the odd one.
// A word's bytes are looked up each by itself, by 2 q and 2 q + 1, and 32 more for the second column. Bytes of both are
// taken from where 2 q stands, with the bits around it.
struct FourColumns {
  const IndexBits& bits;
  __m512i packed;

  LS_INLINE FourColumns(const IndexBits& bits, const uint8_t* from) : bits(bits), packed(_mm512_loadu_si512(from)) {}

  template <int kColumn>
  LS_INLINE void look_up(vf low, vf high, bf16* to) const {
    constexpr uint64_t at = 4 * kColumn + 63;  // of the first word, as all modulo 64
    constexpr uint64_t words = at % 64 | (at + 16) % 64 << 16 | (at + 32) % 64 << 32 | (at + 48) % 64 << 48;
    const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)(words * 0x0101)), packed);
    constexpr int kAndOr = 0xea;
    const __m512i index = _mm512_ternarylogic_epi32(bytes, bits.keep, kColumn % 2 ? bits.odd : bits.even, kAndOr);
    _mm512_storeu_si512(to + kColumn * 32, _mm512_permutexvar_epi8(index, (__m512i)words_of(low, high)));
  }
};

// Four columns of 4 bits. `scales`, `minima`: theirs. Two by two, since rounding takes two vectors.
template <int kPlain>
LS_INLINE void expand_four(const IndexBits& bits, const uint8_t* from, vf q, const float* scales, const float* minima,
                           bf16* to) {
  const FourColumns four(bits, from);
  vf values[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    values[i] = kPlain == liushui::kInt4 ? q * scales[i] : fma(q, splat(scales[i]), splat(minima[i]));
  four.look_up<0>(values[0], values[1], to), four.look_up<1>(values[0], values[1], to);
  four.look_up<2>(values[2], values[3], to), four.look_up<3>(values[2], values[3], to);
}

// Columns 16 half to 16 half + 15 of a group -> [16][32 values], a tile as a product's first factor, or (weight_second)
// as its second one.
template <int kPlain>
LS_INLINE void expand_tile(const uint8_t* group, const uint8_t* header, int half, bf16* to) {
  constexpr WideLayout layout = wide_layout(kPlain);
  const uint8_t* values = group + half * (layout.values / 2);
  alignas(64) float held[3 * kHalf];
  wide_scales<kPlain>(group, header, half * kHalf, held, held + 2 * kHalf);
  if constexpr (kPlain == liushui::kInt8) {
    expand_pairs<true>(values, load(held), 16, to);
  } else if constexpr (kPlain == liushui::kInt6K) {
    expand_pairs<false>(values, load(held), 8, to);
    expand_pairs<false>(values + 256, load(held + kHalf), 8, to + 256);
  } else {
    const float* scales = held;
    asm("" : "+r"(scales) : : "memory");  // read one by one from memory: that is not the port which looks up
    const IndexBits bits;
    vf q;
    for (int i = 0; i < W; i++) q[i] = (float)(i - (kPlain == liushui::kInt4 ? 8 : 0));
#pragma GCC unroll 4
    for (int c = 0; c < kHalf; c += 4)
      expand_four<kPlain>(bits, values + c * 16, q, scales + c, scales + 2 * kHalf + c, to + c * 32);
  }
}

// -- rows of the weight

// Value `at` of 32.
template <int kPlain>
int wide_value(const uint8_t* group, int column, int at) {
  if constexpr (weight_second(kPlain))
    return (int8_t)(group[column / 16 * 512 + byte_place(column % 16, at)] ^ kByteFlip);
  const uint8_t nibbles = group[column / 4 * 64 + at * 2 + column % 4 / 2];
  return (nibbles >> column % 2 * 4 & 15) - (kPlain == liushui::kInt4 ? 8 : 0);
}

template <int kPlain>
void wide_row(const uint8_t* panel, int column, long k, float* out) {
  constexpr WideLayout layout = wide_layout(kPlain);
  constexpr bool kMinimum = kPlain == liushui::kInt4Min || kPlain == liushui::kInt4K;
  float scales[2 * kHalf], minima[kHalf];
  for (long i = 0; i < k; i++) {
    const long g = i / 32, at = i % 32;
    const uint8_t* group = panel + layout.at(g);
    if (at == 0) wide_scales<kPlain>(group, panel + layout.header_at(g), column & 16, scales, minima);
    const float scale = scales[(kPlain == liushui::kInt6K ? at & 16 : 0) + column % kHalf];
    const float value = (float)wide_value<kPlain>(group, column, (int)at) * scale;
    out[i] = kMinimum ? value + minima[column % kHalf] : value;
  }
}

// Row `row` of the weight as float32.
inline void wide_embed(const PackedWeight& w, long row, float* out) {
  const uint8_t* panel = (const uint8_t*)w.data + row / kWide * wide_panel_bytes(w);
  const int column = (int)(row % kWide);
  switch (plain_format(w.format)) {
    case liushui::kInt4: return wide_row<liushui::kInt4>(panel, column, w.k, out);
    case liushui::kInt4Min: return wide_row<liushui::kInt4Min>(panel, column, w.k, out);
    case liushui::kInt4K: return wide_row<liushui::kInt4K>(panel, column, w.k, out);
    case liushui::kInt6K: return wide_row<liushui::kInt6K>(panel, column, w.k, out);
    default: return wide_row<liushui::kInt8>(panel, column, w.k, out);
  }
}

}  // namespace
#endif
