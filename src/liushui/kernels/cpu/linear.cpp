// The products under one interface (linear.h), and their C names, compiled once per instruction set.
#include "amx_bf16.h"
#include "amx_int8.h"
#include "gemm.h"
#include "quant_pack.h"

namespace liushui {
namespace LS_ISA {

namespace {

bool is_integer(const PackedWeight& w) { return w.format >= kInt8; }

}  // namespace

size_t prepared_bytes(const PackedWeight& w, int x_type, long rows) {
  if (is_integer(w)) return (size_t)((rows + 15) / 16 * groups_of(w)) * sizeof(PreparedGroup);
#if defined(LS_TILE_BF16)
  if (w.format == kWeightBF16)
    return bf16_direct(w.k, x_type, rows) ? 0 : (size_t)((rows + kTile - 1) / kTile * bf16_chunks(w.k) * kTileBytes);
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
  if (x_type == kBFloat16)
    bf16_rows(w.k, (const bf16*)x, begin, end, (bf16*)prepared);
  else
    bf16_rows(w.k, (const float*)x, begin, end, (bf16*)prepared);
#else
  const bf16* from = (const bf16*)x;
  float* to = (float*)prepared;
  for (long i = begin * w.k; i < end * w.k; i += W) store_up_to(to + i, load_up_to(from + i, end * w.k - i), end * w.k - i);
#endif
}

void multiply(const PackedWeight& weight, const void* prepared, int x_type, long rows, const Output& out, int worker,
              int workers) {
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
      bf16_multiply(*w, prepared, x_type, rows, column, out, worker, workers);
#else
      (void)x_type;
      gemm_multiply<bf16>(*w, (const float*)prepared, rows, column, out, worker, workers);
#endif
    }
  }
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
      bf16_embed(*w, id, row);
#else
      gemm_embed<bf16>(*w, id, row);
#endif
    emit_rows(out, nullptr, 0, i, 1, 0, w->k, row, w->k);
  }
}

namespace {

// Bytes of the packed form of [n, k], or -1 for what cannot be packed.
long weight_bytes(const PackedWeight& w) {
  if (w.n < 1 || w.k < 1) return -1;
  const long panels = (w.n + kColumns - 1) / kColumns, floats = (w.n + kPanel - 1) / kPanel * kPanel * w.k;
  if (w.format == kWeightF32) return floats * 4;
#if defined(LS_TILE_BF16)
  if (w.format == kWeightBF16) return panels * bf16_chunks(w.k) * kTileBytes;
#else
  if (w.format == kWeightBF16) return floats * 2;
#endif
  if (w.format > kInt6K || (format_of(w.format).scale_block == 256 && w.k % 256)) return -1;
  return panels * quant_panel_bytes(w);
}

bool can_pack(int format, int source) {
  switch (source) {
    case kFromF32: return format == kWeightF32 || format == kInt8 || format == kInt4;
    case kFromBF16: return format == kWeightBF16;
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

void pack_panel(void* context, long panel) {
  const PackTask& a = *(const PackTask*)context;
  const PackedWeight& w = *a.w;
  if (is_integer(w))
    return quant_pack_panel(w, a.source, (const uint8_t*)a.rows, source_row_bytes(a.source, w.k), panel,
                            (uint8_t*)a.data);
  if (w.format == kWeightF32) return gemm_pack_panel((const float*)a.rows, w.n, w.k, panel, (float*)a.data);
#if defined(LS_TILE_BF16)
  bf16_pack_panel((const bf16*)a.rows, w.n, w.k, panel, (bf16*)a.data);
#else
  gemm_pack_panel((const bf16*)a.rows, w.n, w.k, panel, (bf16*)a.data);
#endif
}

long panels_of(const PackedWeight& w) {
#if defined(LS_TILE_BF16)
  const bool wide = w.format == kWeightF32;
#else
  const bool wide = !is_integer(w);
#endif
  const long width = wide ? kPanel : kColumns;
  return (w.n + width - 1) / width;
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
  prepare_rows(*a.w, a.x, a.x_type, begin, min_of(a.rows, begin + a.rows_per_task), a.prepared);
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
  if (!can_pack(w->format, source) || weight_bytes(*w) < 0 || w->k % source_block(source)) return 1;
  use_huge_pages(data, (size_t)weight_bytes(*w));
  PackTask task = {w, source, (const char*)rows, data};
  parallel(threads, panels_of(*w), pack_panel, &task);
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
