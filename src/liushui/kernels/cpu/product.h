// What the products of all formats share: panels, shares of the work, and what becomes of a finished piece of y.
#pragma once
#include "linear.h"
#include "simd.h"

namespace {

using liushui::Output;
using liushui::PackedWeight;

constexpr int kColumns = 16;    // columns of a panel; float32 has its own (gemm.h)
constexpr int kInnerGroup = 32;  // values of x that share a scale, and depth of a tile
static_assert(kColumns % W == 0, "a panel is whole vectors");

// Units of work in order of the panels; those of a panel (all its row blocks) lie together.
struct Share {
  long begin, end;
};
LS_INLINE Share share_of(long units, int worker, int workers) {
  return {units * worker / workers, units * (worker + 1) / workers};
}

template <class T>
LS_INLINE void emit_as(const Output& out, long row, long column, long count, float* y) {
  T* to = (T*)out.data + row * out.stride + column;
  for (long i = 0; i < count; i += W) {
    const long n = count - i;
    if (out.epilogue == liushui::kAdd) {
      T once[W];
      store(once, load_up_to(y + i, n));
      store_up_to(to + i, load_up_to(to + i, n) + load(once), n);
    } else {
      store_up_to(to + i, load_up_to(y + i, n), n);
    }
  }
}

// Columns [column, column + count) of a row of y, bias not yet added. y may be changed.
inline void emit(const Output& out, const float* bias, int worker, long row, long column, long count, float* y) {
  if (bias)
    for (long i = 0; i < count; i += W)
      store_up_to(y + i, load_up_to(y + i, count - i) + load_up_to(bias + i, count - i), count - i);
  if (out.epilogue == liushui::kHand) {
    if (out.type == liushui::kBFloat16)
      for (long i = 0; i < count; i += W) {
        bf16 once[W];
        store(once, load_up_to(y + i, count - i));
        store_up_to(y + i, load(once), count - i);
      }
    out.hand(out.context, worker, row, column, y, count);
  } else if (out.type == liushui::kBFloat16) {
    emit_as<bf16>(out, row, column, count, y);
  } else {
    emit_as<float>(out, row, column, count, y);
  }
}

}  // namespace
