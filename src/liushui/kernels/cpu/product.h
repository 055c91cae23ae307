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

// `count` columns of `rows` rows; kFull: count is a whole number of vectors.
template <class T, bool kAdd, bool kFull>
void emit_as(const Output& out, long row, long rows, long column, long count, const float* bias, const float* y,
             long ldy) {
  for (long r = 0; r < rows; r++, y += ldy) {
    T* to = (T*)out.data + (row + r) * out.stride + column;
    for (long i = 0; i < count; i += W) {
      const long n = kFull ? W : count - i;
      vf v = kFull ? load(y + i) : load_up_to(y + i, n);
      if (bias) v = v + (kFull ? load(bias + i) : load_up_to(bias + i, n));
      if (kAdd) v = (kFull ? load(to + i) : load_up_to(to + i, n)) + rounded<T>(v);
      kFull ? store(to + i, v) : store_up_to(to + i, v, n);
    }
  }
}

template <class T>
void hand_over(const Output& out, int worker, long row, long rows, long column, long count, const float* bias,
               const float* y, long ldy) {
  float whole[8 * W];
  for (long r = 0; r < rows; r++)
    for (long from = 0; from < count; from += 8 * W) {
      const long n = min_of(8 * W, count - from);
      for (long i = 0; i < n; i += W) {
        vf v = load_up_to(y + r * ldy + from + i, n - i);
        if (bias) v = v + load_up_to(bias + from + i, n - i);
        store(whole + i, rounded<T>(v));
      }
      out.hand(out.context, worker, row + r, column + from, whole, n);
    }
}

// Columns [column, column + count) of rows [row, row + rows) of y, the bias not yet added.
template <class T>
void emit_typed(const Output& out, const float* bias, int worker, long row, long rows, long column, long count,
                const float* y, long ldy) {
  if (out.epilogue == liushui::kHand)
    hand_over<T>(out, worker, row, rows, column, count, bias, y, ldy);
  else if (out.epilogue == liushui::kAdd)
    (count % W ? emit_as<T, true, false> : emit_as<T, true, true>)(out, row, rows, column, count, bias, y, ldy);
  else
    (count % W ? emit_as<T, false, false> : emit_as<T, false, true>)(out, row, rows, column, count, bias, y, ldy);
}

inline void emit_rows(const Output& out, const float* bias, int worker, long row, long rows, long column, long count,
                      const float* y, long ldy) {
  (out.type == liushui::kBFloat16 ? emit_typed<bf16> : emit_typed<float>)(out, bias, worker, row, rows, column, count,
                                                                           y, ldy);
}

}  // namespace
