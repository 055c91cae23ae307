// A lone row times expanded blocks (amx_blocks.h). The weight is one stream of tiles, whatever panels they belong to:
// the next panel's are begun before one is done. Two panels at a time share each tile of x, which is one column, or, the
// weight being the second factor, one row: products of that take little more than half the time.
#pragma once
#include "amx_blocks.h"
#include "rows.h"

#if defined(LS_TILE_BF16)
namespace {

constexpr long kLonePanels = 64;  // before their sums are put out
constexpr int kMostHelping = 15;  // workers: two bits each

// Makes the tiles of panels that follow each other, or (kTwo) of such pairs: a group of the one, then of the other.
template <int kPlain, bool kTwo>
struct LoneMaker {
  const uint8_t* weight;
  long group, end, apart;  // groups; between the panels of a pair
  char* ring;
  long next = 0;

  char* place(long tile) const { return ring + (tile & (kTileRing - 1)) * kWideTile; }

  // The tile of columns 0, 16; of the other panel's columns 0, 16.
  template <int kWhich>
  LS_INLINE void make() {
    if (group == end) return;
    constexpr WideLayout layout = wide_layout(kPlain);
    constexpr long kBytes = (layout.group + layout.header / 8) / 2;
    constexpr int kSecond = kWhich % 2;
    const long g = kWhich < 2 ? group : group + apart;
    const uint8_t* held = weight + layout.at(g);
    fetch_lines<(int)((kBytes + 63) / 64)>(held + kSecond * kBytes + kFetchAhead);
    expand_tile<kPlain>(held, weight + layout.header_at(g), kSecond, (bf16*)place(next++));
    if (kWhich == (kTwo ? 3 : 1)) group++;
  }
};

// x times `count` panels from `first` on -> sums [count][32]; kTwo: and as many from first + distance on -> others.
template <int kPlain, bool kTwo>
void lone_panels(const PackedWeight& w, const bf16* x, long first, long count, long distance, char* ring, float* sums,
                 float* others) {
  constexpr bool kSecond = weight_second(kPlain);
  constexpr long kApart = kSecond ? 64 : 4;  // bytes from row to row of x and of sums
  const long chunks = groups_of(w);
  LoneMaker<kPlain, kTwo> maker = {(const uint8_t*)w.data, first * chunks, (first + count) * chunks, distance * chunks,
                                   ring};
  maker.template make<0>();
  maker.template make<1>();
  maker.template make<kTwo ? 2 : 0>();
  static_assert(kTilesAhead == 3, "as many");
  long t = 0;
  for (; count > 0; count--, sums += kWide, others += kWide) {
    begin_sums<kTwo>(nullptr);
    for (long i = 0; i < chunks; i++, t += kTwo ? 4 : 2) {
      LS_TILE_LOAD(6, x + i * kInnerGroup, kApart);
      maker.template make<kTwo ? 3 : 1>();
      LS_TILE_LOAD(4, maker.place(t), 64);
      LS_WIDE_ADD(0, 4, 6);
      maker.template make<0>();
      LS_TILE_LOAD(5, maker.place(t + 1), 64);
      LS_WIDE_ADD(1, 5, 6);
      if (!kTwo) continue;
      maker.template make<1>();
      LS_TILE_LOAD(4, maker.place(t + 2), 64);
      LS_WIDE_ADD(2, 4, 6);
      maker.template make<2>();
      LS_TILE_LOAD(5, maker.place(t + 3), 64);
      LS_WIDE_ADD(3, 5, 6);
    }
    LS_TILE_STORE(0, sums, kApart);
    LS_TILE_STORE(1, sums + kTile, kApart);
    if (!kTwo) continue;
    LS_TILE_STORE(2, others, kApart);
    LS_TILE_STORE(3, others + kTile, kApart);
  }
}

using LonePanels = void (*)(const PackedWeight&, const bf16*, long, long, long, char*, float*, float*);

template <bool kTwo>
LonePanels lone_kernel(const PackedWeight& w) {
  switch (plain_format(w.format)) {
    case liushui::kInt4: return lone_panels<liushui::kInt4, kTwo>;
    case liushui::kInt4Min: return lone_panels<liushui::kInt4Min, kTwo>;
    case liushui::kInt4K: return lone_panels<liushui::kInt4K, kTwo>;
    case liushui::kInt6K: return lone_panels<liushui::kInt6K, kTwo>;
    default: return lone_panels<liushui::kInt8, kTwo>;
  }
}

// Calls each(first panel, panels) for what `worker` takes of w, tiles being set up: its share; if there is `taken`, the
// last quarter only where no other has come before it, and then what others have not come to.
template <class Each>
void lone_units(const PackedWeight& w, long panels, int worker, int workers, int32_t* taken, const Each& each) {
  const bool help = taken && workers > 1 && workers <= kMostHelping;
  const auto cut = [&](int owner, int eighths) {
    const Share share = share_of(panels, owner, workers);
    return share.begin + (share.end - share.begin) * eighths / 8;
  };
  const auto run = [&](long begin, long end) {
    for (; begin < end; begin += kLonePanels) each(begin, min_of(kLonePanels, end - begin));
  };
  configure_wide(1, weight_second(plain_format(w.format)));
  run(cut(worker, 0), cut(worker, help ? 6 : 8));
  for (int i = 0; help && i < 2 * workers; i++) {
    const int piece = (2 * worker + i) % (2 * workers), bit = 1 << piece;
    if (__atomic_load_n(taken, __ATOMIC_RELAXED) & bit) continue;
    if (__atomic_fetch_or(taken, bit, __ATOMIC_RELAXED) & bit) continue;
    run(cut(piece / 2, 6 + piece % 2), cut(piece / 2, 7 + piece % 2));
  }
  LS_TILE_RELEASE();
}

inline void lone_multiply(const PackedWeight& w, const bf16* x, long first_column, const Output& out, int worker,
                          int workers, int32_t* taken) {
  char* ring = (char*)liushui::scratch(liushui::kProduct, kTileRing * kWideTile + kLonePanels * kWide * sizeof(float));
  float* sums = (float*)(ring + kTileRing * kWideTile);
  const LonePanels two = lone_kernel<true>(w), one = lone_kernel<false>(w);
  lone_units(w, (w.n + kWide - 1) / kWide, worker, workers, taken, [&](long first, long panels) {
    const long pairs = panels / 2;
    if (pairs) two(w, x, first, pairs, pairs, ring, sums, sums + pairs * kWide);
    if (panels % 2) one(w, x, first + panels - 1, 1, 0, ring, sums + (panels - 1) * kWide, sums);
    const long column = first * kWide, count = min_of((first + panels) * kWide, w.n) - column;
    emit_rows(out, w.bias ? w.bias + column : nullptr, worker, 0, 1, first_column + column, count, sums, count);
  });
}

LS_INLINE vf gated(vf gate, vf up) { return silu<bf16>(rounded<bf16>(gate)) * rounded<bf16>(up); }

inline void gate_lone(const float* gate, const float* up, const float* gate_bias, const float* up_bias, bf16* to) {
  for (int c = 0; c < kWide; c += W) {
    vf g = load(gate + c), u = load(up + c);
    if (gate_bias) g = g + load(gate_bias + c), u = u + load(up_bias + c);
    store(to + c, gated(g, u));
  }
}

// SwiGLU's two products; half: panels of each.
inline void lone_multiply_gated(const PackedWeight& gate_up, const bf16* x, long half, bf16* inner, int worker,
                                int workers, int32_t* taken) {
  constexpr long kBytes = kLonePanels * kWide * sizeof(float);
  char* ring = (char*)liushui::scratch(liushui::kProduct, kTileRing * kWideTile + 2 * kBytes);
  float *gates = (float*)(ring + kTileRing * kWideTile), *ups = gates + kBytes / 4;
  const LonePanels kernel = lone_kernel<true>(gate_up);
  lone_units(gate_up, half, worker, workers, taken, [&](long first, long panels) {
    kernel(gate_up, x, first, panels, half, ring, gates, ups);
    for (long panel = 0; panel < panels; panel++) {
      const float* bias = gate_up.bias ? gate_up.bias + (first + panel) * kWide : nullptr;
      gate_lone(gates + panel * kWide, ups + panel * kWide, bias, bias ? bias + half * kWide : nullptr,
                inner + (first + panel) * kWide);
    }
  });
}

}  // namespace
#endif
