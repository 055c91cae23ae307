// y = x w^T + bias for weights in any of the formats below: the interface of linear.cpp, which is compiled once per
// instruction set into the namespace liushui::<isa>.
//
// A product has two halves, both meant to be called by every worker of a parallel region, with a barrier between:
//   prepare_rows  turns rows of x into what the format multiplies with (each row by itself, so rows can be dealt out
//                 in any way; nothing to do where prepared_bytes is 0);
//   multiply      worker w of W forms its share of the columns, for all rows.
// Each element of y is one chain of operations over k, whatever the number of rows, workers or columns: a row's bits
// are the same alone and in company.
#pragma once
#include "library.h"

namespace liushui {

enum ElementType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// How the values of a weight are held. Integers have a scale for each group along k; x is then rounded to 16 bits, in
// groups of 32 with a float scale, the sum inside a group is exact, and groups are added in order in float.
enum WeightFormat : int32_t {
  kWeightF32 = 0,   // float32; x must be float32
  kWeightBF16 = 1,  // bfloat16
  kInt8 = 2,        // int8, groups of 32, float16 scale                                   (Q8_0, Q5_0)
  kInt4 = 3,        // 4 bits less 8, groups of 32, float16 scale                          (Q4_0)
  kInt4Min = 4,     // 4 bits, groups of 32, float16 scale and minimum                     (Q4_1)
  kInt4K = 5,       // 4 bits, groups of 32, 6-bit scales and minima times two float16 per 256  (Q4_K)
  kInt6K = 6,       // int8, groups of 16, int8 scales times a float16 per 256             (Q6_K)
  // Added to one of the integers', with AMX and x in bfloat16: the values scale * q + minimum are rounded to bfloat16,
  // and the product has the bits of kWeightBF16 with those values.
  kAsBFloat16 = 16,
};

// A weight [n, k] as pack made it for one instruction set. Memory belongs to the caller.
struct PackedWeight {
  int32_t format;            // WeightFormat
  int32_t reserved;
  int64_t n, k;              // outputs, inputs
  const void* data;          // 64-byte aligned panels of 16 columns (float32: of 2 vectors)
  const float* bias;         // [n] or null; always float32
  const PackedWeight* next;  // further rows of the same stacked weight, in another format; null at the end
};

enum Epilogue : int32_t {
  kStore = 0,  // data = y
  kAdd = 1,    // data += y, y having been rounded to the output's type first: as the two operations one by one
  kHand = 2,   // nothing is stored: y, rounded to the output's type, goes to `hand` as float32
};

// Where y [rows, n] goes. With `next` weights, their columns follow those of the first.
struct Output {
  void* data;
  int32_t type;  // ElementType
  int32_t epilogue;
  int64_t stride;  // elements between rows of data
  // kHand: `count` values of row `row` from column `column` on. Called by the worker that formed them; columns of a
  // row come in ascending order within a worker, and each is handed over exactly once.
  void (*hand)(void* context, int worker, long row, long column, const float* values, long count);
  void* context;
};

#ifdef LS_ISA
namespace LS_ISA {

// Size of the prepared form of `rows` rows; 0: x itself is what multiply reads (contiguous rows of k).
size_t prepared_bytes(const PackedWeight& weight, int x_type, long rows);

// Prepares rows [row_begin, row_end), the first of which is at x (contiguous), at their place in `prepared` (64-byte
// aligned). The result serves every weight of the same k and the same kind (integers; bfloat16).
void prepare_rows(const PackedWeight& weight, const void* x, int x_type, long row_begin, long row_end, void* prepared);

// How many of `rows` rows, from a multiple of that number on, are best prepared in one call.
long rows_together(const PackedWeight& weight, long rows);

// The share of `worker` (0 .. workers - 1) in y, for rows [0, rows) of `prepared` (or of x, where nothing had to be
// prepared). Uses scratch memory kProduct. Shares do not overlap and together are everything. `taken`: a word of zeros
// that the workers share; with it, who is done may take over some of another's share. (Not for kHand, which is to see
// columns in order.)
void multiply(const PackedWeight& weight, const void* prepared, int x_type, long rows, const Output& out, int worker,
              int workers, int32_t* taken = nullptr);

// Whether multiply_gated can serve: `gate_up` has the rows of a gate, then as many of what it lets through.
bool can_gate(const PackedWeight& gate_up, const PackedWeight& down, int x_type);

// The share of `worker` in silu(x gate^T) * (x up^T), every operation rounded as by itself, to `inner`: in the form
// that `down` multiplies with, that is prepared, or rows as they are where nothing has to be prepared.
void multiply_gated(const PackedWeight& gate_up, const PackedWeight& down, const void* prepared, long rows, void* inner,
                    int worker, int workers, int32_t* taken = nullptr);

// Rows ids[begin .. end) of the weight, dequantised, to rows [begin, end) of out (kStore). The ids are in range.
void embed_rows(const PackedWeight& weight, const int64_t* ids, long begin, long end, const Output& out);

}  // namespace LS_ISA
#endif

}  // namespace liushui
