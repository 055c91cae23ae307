// The products under one interface (linear.h), and their C names, compiled once per instruction set.
#include "bf16.h"
#include "amx_blocks_gated.h"
#include "bf16_gated.h"
#include "amx_int8.h"
#include "gemm.h"
#include "mixed.h"
#include "quant_pack.h"
#include "unpack.h"

namespace liushui {
namespace LS_ISA {

namespace {

// Integers that are multiplied as such, and those that are expanded.
bool is_integer(const PackedWeight& w) { return w.format >= kInt8 && w.format <= kInt6K; }
bool is_expanded(const PackedWeight& w) { return w.format >= kAsBFloat16; }

}  // namespace

size_t prepared_bytes(const PackedWeight& w, int x_type, long rows) {
  if (is_integer(w)) return (size_t)((rows + 15) / 16 * groups_of(w)) * sizeof(PreparedGroup);
#if defined(LS_TILE_BF16)
  if (is_expanded(w)) return wide_prepared_bytes(w, rows);
#endif
#if defined(LS_BF16)
  if (w.format == kWeightBF16 && x_type == kBFloat16) return bf16_prepared_bytes(w.k, x_type, rows);
#endif
  return w.format == kWeightBF16 && x_type == kBFloat16 ? (size_t)(rows * w.k) * sizeof(float) : 0;
}

void prepare_rows(const PackedWeight& w, const void* x, int x_type, long begin, long end, void* prepared) {
  if (is_integer(w)) {
    if (x_type == kBFloat16)
      quantise_rows(w.k, (const bf16*)x, begin, end, (PreparedGroup*)prepared);
    else
      quantise_rows(w.k, (const float*)x, begin, end, (PreparedGroup*)prepared);
    return;
  }
#if defined(LS_TILE_BF16)
  if (is_expanded(w)) return wide_rows(w, (const bf16*)x, begin, end, (bf16*)prepared);
#endif
#if defined(LS_BF16)
  bf16_rows<bf16>(w.k, (const bf16*)x, begin, end, (bf16*)prepared);
#else
  const bf16* from = (const bf16*)x;
  float* to = (float*)prepared + begin * w.k;
  const long count = (end - begin) * w.k;
  for (long i = 0; i < count; i += W) store_up_to(to + i, load_up_to(from + i, count - i), count - i);
#endif
}

long rows_together(const PackedWeight& w, long rows) {
#if defined(LS_TILE_BF16)
  if (is_expanded(w) && WideForms(w).pairs && rows >= 2 * kTile) return kTile;
#endif
  (void)w, (void)rows;
  return 1;
}

void multiply(const PackedWeight& weight, const void* prepared, int x_type, long rows, const Output& out, int worker,
              int workers, int32_t* taken) {
  (void)x_type, (void)taken;
  long column = 0;
  for (const PackedWeight* w = &weight; w; column += w->n, w = w->next) {
    if (is_integer(*w)) {
#if defined(LS_TILE_INT8)
      if (rows >= kTileRowsFrom)
        int8_multiply(*w, (const PreparedGroup*)prepared, rows, column, out, worker, workers);
      else
#endif
        quant_multiply(*w, (const PreparedGroup*)prepared, rows, column, out, worker, workers);
    } else if (w->format == kWeightF32) {
      gemm_multiply<float>(*w, (const float*)prepared, rows, column, out, worker, workers);
    } else {
#if defined(LS_TILE_BF16)
      if (is_expanded(*w) && wide_direct(w->k, rows))
        lone_multiply(*w, (const bf16*)prepared, column, out, worker, workers, w == &weight ? taken : nullptr);
      else if (is_expanded(*w))
        wide_multiply(weight, *w, prepared, rows, column, out, worker, workers);
      else
#endif
#if defined(LS_BF16)
      if (x_type == kFloat32)
        mixed_multiply(*w, (const float*)prepared, rows, column, out, worker, workers);
      else
        bf16_multiply(*w, prepared, x_type, rows, column, out, worker, workers);
#else
      gemm_multiply<bf16>(*w, (const float*)prepared, rows, column, out, worker, workers);
#endif
    }
  }
}

bool can_gate(const PackedWeight& gate_up, const PackedWeight& down, int x_type) {
#if defined(LS_TILE_BF16)
  return x_type == kBFloat16 && (gated_fits(gate_up, down) || wide_gated_fits(gate_up, down));
#elif defined(LS_BF16)
  return x_type == kBFloat16 && gated_fits(gate_up, down);
#else
  (void)gate_up, (void)down, (void)x_type;
  return false;
#endif
}

void multiply_gated(const PackedWeight& gate_up, const PackedWeight& down, const void* prepared, long rows, void* inner,
                    int worker, int workers, int32_t* taken) {
  (void)gate_up, (void)down, (void)prepared, (void)rows, (void)inner, (void)worker, (void)workers, (void)taken;
#if defined(LS_TILE_BF16)
  if (is_expanded(gate_up) && wide_direct(gate_up.k, rows))
    return lone_multiply_gated(gate_up, (const bf16*)prepared, down.k / kWide, (bf16*)inner, worker, workers, taken);
  (is_expanded(gate_up) ? wide_multiply_gated : bf16_multiply_gated)(gate_up, down, prepared, rows, (bf16*)inner, worker,
                                                                     workers);
#elif defined(LS_BF16)
  bf16_multiply_gated(gate_up, down, prepared, rows, (bf16*)inner, worker, workers);
#endif
}

void embed_rows(const PackedWeight& weight, const int64_t* ids, long begin, long end, const Output& out) {
  float* row = (float*)scratch(kWork, (size_t)weight.k * sizeof(float));
  for (long i = begin; i < end; i++) {
    const PackedWeight* w = &weight;
    long id = ids[i];
    for (; id >= w->n; w = w->next) id -= w->n;
    if (is_integer(*w))
      quant_embed(*w, id, row);
    else if (w->format == kWeightF32)
      gemm_embed<float>(*w, id, row);
    else
#if defined(LS_TILE_BF16)
      (is_expanded(*w) ? wide_embed : bf16_embed)(*w, id, row);
#elif defined(LS_BF16)
      bf16_embed(*w, id, row);
#else
      gemm_embed<bf16>(*w, id, row);
#endif
    if (out.type == kBFloat16)
      narrow_row(row, w->k, (bf16*)out.data + i * out.stride);
    else
      memcpy((float*)out.data + i * out.stride, row, (size_t)w->k * sizeof(float));
  }
}

namespace {

// Bytes of the packed form of [n, k], or -1 for what cannot be packed.
long weight_bytes(const PackedWeight& w) {
  if (w.n < 1 || w.k < 1) return -1;
  const long panels = (w.n + kColumns - 1) / kColumns, floats = (w.n + kPanel - 1) / kPanel * kPanel * w.k;
  if (w.format == kWeightF32) return floats * 4;
#if defined(LS_BF16)
  if (w.format == kWeightBF16) return bf16_panels(w.n) * bf16_chunks(w.k) * kPairBytes;
#else
  if (w.format == kWeightBF16) return floats * 2;
#endif
#if defined(LS_TILE_BF16)
  if (is_expanded(w)) {
    const int plain = plain_format(w.format);
    const bool known = plain >= kInt8 && plain <= kInt6K && (format_of(plain).scale_block != 256 || w.k % 256 == 0);
    return known ? (w.n + kWide - 1) / kWide * wide_panel_bytes(w) : -1;
  }
#endif
  if (w.format > kInt6K || (format_of(w.format).scale_block == 256 && w.k % 256)) return -1;
  return panels * quant_panel_bytes(w);
}

// Floating point weights are packed from every type, by way of its values.
bool can_pack(int format, int source) {
  if (format == kWeightF32 || format == kWeightBF16) return unpack_block(source).elements > 0;
  if (format > kAsBFloat16) format -= kAsBFloat16;
  switch (source) {
    case kFromF32: return format == kInt8 || format == kInt4;
    case kFromQ8_0:
    case kFromQ5_0: return format == kInt8;
    case kFromQ4_0: return format == kInt4;
    case kFromQ4_1: return format == kInt4Min;
    case kFromQ4_K: return format == kInt4K;
    case kFromQ6_K: return format == kInt6K;
    default: return false;
  }
}

struct PackTask {
  const PackedWeight* w;
  int source;
  const char* rows;
  void* data;
};

// Columns of a panel.
long panel_width(const PackedWeight& w) {
#if defined(LS_TILE_BF16)
  if (is_expanded(w)) return kWide;
#endif
#if defined(LS_BF16)
  if (w.format == kWeightBF16) return kPairColumns;
#endif
  return is_integer(w) ? kColumns : kPanel;
}

long panels_of(const PackedWeight& w) { return (w.n + panel_width(w) - 1) / panel_width(w); }

// Panel 0 of the `width` rows of floats at `rows`.
void pack_dense(const float* rows, long width, long k, float* to) { gemm_pack_panel(rows, width, k, 0, to); }

void pack_dense(const bf16* rows, long width, long k, bf16* to) {
#if defined(LS_BF16)
  bf16_pack_panel(rows, width, k, to);
#else
  gemm_pack_panel(rows, width, k, 0, to);
#endif
}

// The rows of one panel are unpacked where they stay in the cache: the weight is nowhere in floating point as a whole.
template <class T>
void pack_values(const PackTask& a, long panel) {
  const PackedWeight& w = *a.w;
  const BlockSize block = unpack_block(a.source);
  const long width = panel_width(w), first = panel * width, last = min_of(first + width, w.n);
  const uint8_t* rows = (const uint8_t*)a.rows;
  char* to = (char*)a.data + panel * (weight_bytes(w) / panels_of(w));
  if (a.source == (sizeof(T) == 4 ? kFromF32 : kFromBF16))
    return pack_dense((const T*)(rows + first * (w.k / block.elements * block.bytes)), last - first, w.k, (T*)to);
  T* values = (T*)scratch(kShared, (size_t)(width * w.k) * sizeof(T));
  unpack_rows(a.source, rows, w.k, first, last, values);
  pack_dense(values, last - first, w.k, (T*)to);
}

void pack_panel(void* context, long panel) {
  const PackTask& a = *(const PackTask*)context;
  const PackedWeight& w = *a.w;
#if defined(LS_TILE_BF16)
  if (is_expanded(w))
    return wide_pack_panel(w, a.source, (const uint8_t*)a.rows, source_row_bytes(a.source, w.k), panel, (uint8_t*)a.data);
#endif
  if (is_integer(w))
    quant_pack_panel(w, a.source, (const uint8_t*)a.rows, source_row_bytes(a.source, w.k), panel, (uint8_t*)a.data);
  else if (w.format == kWeightF32)
    pack_values<float>(a, panel);
  else
    pack_values<bf16>(a, panel);
}

struct UnpackTask {
  int source;
  const uint8_t* rows;
  long n, k;
  void* out;
  int out_type;
};

constexpr long kUnpackRows = 8;

void unpack_task(void* context, long task) {
  const UnpackTask& a = *(const UnpackTask*)context;
  const long begin = task * kUnpackRows, end = min_of(a.n, begin + kUnpackRows);
  if (a.out_type == kBFloat16)
    unpack_rows(a.source, a.rows, a.k, begin, end, (bf16*)a.out + begin * a.k);
  else
    unpack_rows(a.source, a.rows, a.k, begin, end, (float*)a.out + begin * a.k);
}

struct ProductTask {
  const PackedWeight* w;
  const void* x;
  int x_type;
  long rows, rows_per_task;
  void* prepared;
  Output out;
  int workers;
};

void prepare_task(void* context, long task) {
  const ProductTask& a = *(const ProductTask*)context;
  const long begin = task * a.rows_per_task;
  const char* first = (const char*)a.x + begin * a.w->k * (a.x_type == kBFloat16 ? 2 : 4);
  prepare_rows(*a.w, first, a.x_type, begin, min_of(a.rows, begin + a.rows_per_task), a.prepared);
}

void multiply_task(void* context, long worker) {
  const ProductTask& a = *(const ProductTask*)context;
  multiply(*a.w, a.prepared, a.x_type, a.rows, a.out, (int)worker, a.workers);
}

struct EmbedTask {
  const PackedWeight* w;
  const int64_t* ids;
  long count;
  Output out;
};

constexpr long kEmbedRows = 16;

void embed_task(void* context, long task) {
  const EmbedTask& a = *(const EmbedTask*)context;
  embed_rows(*a.w, a.ids, task * kEmbedRows, min_of(a.count, (task + 1) * kEmbedRows), a.out);
}

}  // namespace
}  // namespace LS_ISA
}  // namespace liushui

#define LS_JOIN2(a, b) liushui_##a##_##b
#define LS_JOIN(a, b) LS_JOIN2(a, b)
#define LS_EXPORT(result, name) extern "C" __attribute__((visibility("default"))) result LS_JOIN(name, LS_ISA)

using namespace liushui;
using namespace liushui::LS_ISA;

LS_EXPORT(int64_t, weight_bytes)(const PackedWeight* w) { return weight_bytes(*w); }

// `rows` [n, bytes of a row of `source`] -> data, weight_bytes long. Non-zero: no such conversion, or k is no whole
// number of the source's blocks.
LS_EXPORT(int, pack)(int threads, const PackedWeight* w, int source, const void* rows, void* data) {
  if (!can_pack(w->format, source) || weight_bytes(*w) < 0 || w->k % unpack_block(source).elements) return 1;
  use_huge_pages(data, (size_t)weight_bytes(*w));
  PackTask task = {w, source, (const char*)rows, data};
  parallel(threads, panels_of(*w), pack_panel, &task);
  return 0;
}

// The values of `rows` [n, bytes of a row of `source`] -> out [n, k]. Non-zero: an unknown type, or k is no whole number
// of its blocks.
LS_EXPORT(int, unpack)(int threads, int source, const void* rows, long n, long k, void* out, int out_type) {
  const BlockSize block = unpack_block(source);
  if (block.elements == 0 || k % block.elements) return 1;
  UnpackTask task = {source, (const uint8_t*)rows, n, k, out, out_type};
  parallel(threads, (n + kUnpackRows - 1) / kUnpackRows, unpack_task, &task);
  return 0;
}

LS_EXPORT(int, product)(int threads, const PackedWeight* w, const void* x, int x_type, long rows, void* out,
                        int out_type, int epilogue, long stride) {
  const size_t bytes = prepared_bytes(*w, x_type, rows);
  long width = 0;
  for (const PackedWeight* part = w; part; part = part->next) width += part->n;
  if (rows * w->k * width < 65536) threads = 1;
  // Four shares a thread: a thread that others keep from running holds nobody up for long.
  ProductTask task = {w,    x,  x_type, rows, max_of(1, 8192 / max_of(1, w->k)), (void*)x,
                      {out, out_type, epilogue, stride, nullptr, nullptr}, threads == 1 ? 1 : 4 * threads};
  if (bytes) {
    task.prepared = scratch(kShared, bytes);
    parallel(threads, (rows + task.rows_per_task - 1) / task.rows_per_task, prepare_task, &task);
  }
  parallel(threads, task.workers, multiply_task, &task);
  return 0;
}

// Row ids[i] of the weight, dequantised, to row i of out. Non-zero: an id is out of range.
LS_EXPORT(int, embed)(int threads, const PackedWeight* w, const int64_t* ids, long count, void* out, int out_type,
                      long stride) {
  long height = 0;
  for (const PackedWeight* part = w; part; part = part->next) height += part->n;
  for (long i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= height) return 1;
  EmbedTask task = {w, ids, count, {out, out_type, kStore, stride, nullptr, nullptr}};
  parallel(threads, (count + kEmbedRows - 1) / kEmbedRows, embed_task, &task);
  return 0;
}
