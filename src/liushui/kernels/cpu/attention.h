// Causal attention over the paged KV cache, for any mixture of decodes and prompt chunks.
//
// What one query computes is fixed by its own position alone: its keys in blocks of kKeys and splits of kSplit,
// both aligned to absolute positions; the blocks of a split joined by the online softmax, the splits merged in order
// (as Flash-Decoding does, but always). Which rows share a tile, and who computes it, only decides how often keys are
// read. Keys that a query does not see never enter its arithmetic, so whatever a slot held before it was written
// (NaN, say) is harmless.
#pragma once
#include "attention_block.h"
#include "library.h"

namespace {

using liushui::AttentionTask;
using liushui::kSplit;
static_assert(kSplit % kKeys == 0, "splits are whole blocks");

template <class T>
struct Attention {
  const T *qkv, *k_cache, *v_cache;
  T* out;
  const int32_t *query_start, *seq_lens, *block_table;
  int num_sequences, num_heads, num_kv_heads, head_dim, block_size, max_blocks;
  long rows, num_blocks, qkv_stride;
  float scale;
  int window;  // 0: none
  int threads;
  liushui::AttentionPlan plan;
  float* partials;
  int bad;

  int group() const { return num_heads / num_kv_heads; }
  long padded_dim() const { return round_up(head_dim, W); }
  long partial_width() const { return padded_dim() + 2; }
};

// The state of a task's query rows while they walk over their keys.
struct Rows {
  float *query, *scores;          // [rows, dim] scaled; [kTileRows, kKeys]
  float *sum, *largest, *weight;  // [rows, padded dim] weighted values; [rows] running maximum; [rows] sum of weights
};

// Where a block's keys and values lie in the cache. Keys are there from `from` to `to`, multiples of Kw.
template <class T>
struct Place {
  const T *keys[kKeys], *values[kKeys];
  long from, to;
};

// The block that is being worked on.
template <class T>
struct Block {
  Place<T> here, ahead;
  const float* values[kKeys];
  float *transposed, *widened;  // [dim, kKeys] keys; [kKeys, padded dim] values where need be
  bool in_place;                // few query rows use the values as they lie in the cache
};

// Values as whole vectors of floats, for all rows of the task.
template <class T>
void widen_values(const Attention<T>& a, Block<T>& block) {
  const long dim = a.head_dim, padded = a.padded_dim();
  const bool in_place = sizeof(T) == sizeof(float) && dim % W == 0;
  for (long j = block.here.from; j < block.here.to; j++) {
    float* copy = block.widened + j * padded;
    block.values[j] = in_place ? (const float*)block.here.values[j] : copy;
    if (!in_place)
      for (long d = 0; d < dim; d += W) store(copy + d, load_up_to(block.here.values[j] + d, dim - d));
  }
}

// Finds keys [from, to) of the block that starts at position `start`; zeros stand in for what is not there.
template <class T>
bool locate(Attention<T>& a, const AttentionTask& task, long start, long from, long to, Place<T>& place) {
  static const T nothing[1024] = {};
  const int32_t* table = a.block_table + (long)task.sequence * a.max_blocks;
  place.from = from / Kw * Kw;
  place.to = round_up(to, Kw);
  for (long j = 0; j < from; j++) place.keys[j] = place.values[j] = nothing;
  for (long j = to; j < kKeys; j++) place.keys[j] = place.values[j] = nothing;
  for (long j = from; j < to;) {  // runs of one cache block
    const long number = table[(start + j) / a.block_size], offset = (start + j) % a.block_size;
    if (number < 0 || number >= a.num_blocks) {
      __atomic_store_n(&a.bad, 1, __ATOMIC_RELAXED);
      return false;
    }
    long at = ((number * a.num_kv_heads + task.head) * a.block_size + offset) * a.head_dim;
    for (const long end = min_of(to, j + a.block_size - offset); j < end; j++, at += a.head_dim) {
      place.keys[j] = a.k_cache + at;
      place.values[j] = a.v_cache + at;
    }
  }
  return true;
}

// What rows [row, row + count) of the task see of the block at `start`.
template <class T>
LS_INLINE Sight look(const Attention<T>& a, const AttentionTask& task, long start, long row, int count) {
  Sight s;
  s.all_from = s.last = 0;
  s.all_to = kKeys;
  for (int r = 0; r < count; r++) {
    const long position = task.position + (row + r) / a.group();
    s.from[r] = a.window > 0 ? max_of(0, position - a.window + 1 - start) : 0;
    s.to[r] = min_of(kKeys, position + 1 - start);
    if (s.from[r] >= s.to[r]) s.from[r] = s.to[r] = 0;
    s.all_from = max_of(s.all_from, s.from[r]);
    s.all_to = min_of(s.all_to, s.to[r]);
    s.last = max_of(s.last, s.to[r]);
  }
  return s;
}

template <class T>
void add_block(const Attention<T>& a, const Rows& rows, Block<T>& block, const Sight& sight, long row, int count) {
  const long dim = a.head_dim, padded = a.padded_dim();
  const float* query = rows.query + row * dim;
  float *sum = rows.sum + row * padded, keep[kTileRows];
  tile_rows(count, query, dim, Matrix{block.transposed, kKeys}, 0, dim, rows.scores, kKeys, (sight.last + W - 1) / W,
            nullptr);
  soften(count, sight, rows.scores, rows.largest + row, rows.weight + row, keep);
  if (block.in_place)
    add_values(count, sight, rows.scores, Fetching<T>{block.here.values, block.ahead.keys}, sum, padded, keep);
  else
    add_values(count, sight, rows.scores, Scattered{block.values}, sum, padded, keep);
}

template <class T>
void attend_split(Attention<T>& a, const AttentionTask& task, long split, const Rows& rows, Block<T>& block) {
  const long count = (long)task.count * a.group(), padded = a.padded_dim();
  const long last = task.position + task.count - 1;
  const long lowest = a.window > 0 ? max_of(0, (long)task.position - a.window + 1) : 0;
  const long begin = max_of(split * kSplit, lowest / kKeys * kKeys), end = min_of((split + 1) * kSplit, last + 1);
  memset(rows.sum, 0, (size_t)(count * padded) * sizeof(float));
  for (long r = 0; r < count; r++) {
    rows.largest[r] = -__builtin_inff();
    rows.weight[r] = 0.0f;
  }
  const auto find = [&](long start, Place<T>& place) {
    return locate(a, task, start, min_of(kKeys, max_of(0, lowest - start)), max_of(0, min_of(kKeys, end - start)), place);
  };
  if (!find(begin, block.ahead)) return;
  fetch_rows(block.ahead.keys, kKeys, a.head_dim);
  for (long start = begin; start < end; start += kKeys) {
    block.here = block.ahead;
    if (!find(start + kKeys, block.ahead)) return;
    transpose_keys(block.here.keys, block.here.values, block.here.from, block.here.to, a.head_dim, block.transposed);
    if (!block.in_place) widen_values(a, block);
    for (long row = 0; row < count; row += kTileRows) {
      const int height = (int)min_of(kTileRows, count - row);
      const Sight sight = look(a, task, start, row, height);
      if (sight.last > 0) add_block(a, rows, block, sight, row, height);
    }
  }
}

template <class T>
void write_out(const Attention<T>& a, const AttentionTask& task, long row, const float* sum, float weight) {
  const long group = a.group(), head = task.head * group + row % group;
  T* out = a.out + ((task.row + row / group) * a.num_heads + head) * a.head_dim;
  for (long d = 0; d < a.head_dim; d += W) store_up_to(out + d, load(sum + d) / weight, a.head_dim - d);
}

template <class T>
void gather_queries(const Attention<T>& a, const AttentionTask& task, float* query) {
  const long group = a.group(), dim = a.head_dim;
  for (long r = 0; r < task.count * group; r++) {
    const T* from = a.qkv + (task.row + r / group) * a.qkv_stride + (task.head * group + r % group) * dim;
    for (long d = 0; d < dim; d += W)
      store_up_to(query + r * dim + d, load_up_to(from + d, dim - d) * a.scale, dim - d);
  }
}

// Hands the rows' state to whoever merges the splits.
template <class T>
void write_partial(const Attention<T>& a, const AttentionTask& task, const Rows& rows) {
  const long padded = a.padded_dim();
  float* to = a.partials + task.partial * a.partial_width();
  for (long r = 0; r < (long)task.count * a.group(); r++, to += a.partial_width()) {
    memcpy(to, rows.sum + r * padded, (size_t)padded * sizeof(float));
    to[padded] = rows.largest[r];
    to[padded + 1] = rows.weight[r];
  }
}

template <class T>
void attend_task(void* context, long index) {
  Attention<T>& a = *(Attention<T>*)context;
  const AttentionTask& task = a.plan.tasks[index];
  const long count = (long)task.count * a.group(), dim = a.head_dim, padded = a.padded_dim();
  const long sizes[] = {count * dim, kTileRows * kKeys, count * padded, count, count, dim * kKeys,
                        kKeys * padded, count * padded, count, count};
  float* part[10];
  long total = 0;
  for (long size : sizes) total += round_up(size, 16);
  part[0] = (float*)liushui::scratch(liushui::kWork, (size_t)total * sizeof(float));
  for (int i = 1; i < 10; i++) part[i] = part[i - 1] + round_up(sizes[i - 1], 16);
  const Rows rows = {part[0], part[1], part[2], part[3], part[4]};
  Block<T> block;
  block.transposed = part[5];
  block.widened = part[6];
  block.in_place = count <= 2 * kTileRows && dim % W == 0;
  if (padded > dim) memset(block.widened, 0, (size_t)(kKeys * padded) * sizeof(float));
  float *sum = part[7], *largest = part[8], *weight = part[9];
  memset(weight, 0, (size_t)count * sizeof(float));
  gather_queries(a, task, rows.query);
  for (long split = task.split_begin; split < task.split_end; split++) {
    attend_split(a, task, split, rows, block);
    if (task.partial >= 0) return write_partial(a, task, rows);
    for (long r = 0; r < count; r++)
      merge(sum + r * padded, largest[r], weight[r], rows.sum + r * padded, rows.largest[r], rows.weight[r], padded);
  }
  for (long r = 0; r < count; r++) write_out(a, task, r, sum + r * padded, weight[r]);
}

template <class T>
void merge_task(void* context, long index) {
  const Attention<T>& a = *(const Attention<T>*)context;
  const AttentionTask& task = a.plan.merges[index];
  const long count = (long)task.count * a.group(), padded = a.padded_dim(), width = a.partial_width();
  float* sum = (float*)liushui::scratch(liushui::kWork, (size_t)padded * sizeof(float));
  for (long r = 0; r < count; r++) {
    float largest = 0.0f, weight = 0.0f;
    for (long split = 0; split < task.split_end - task.split_begin; split++) {
      const float* part = a.partials + (task.partial + split * count + r) * width;
      merge(sum, largest, weight, part, part[padded], part[padded + 1], padded);
    }
    write_out(a, task, r, sum, weight);
  }
}

// Whether rows and positions lie within what was given; block numbers are checked where they are read.
template <class T>
bool indices_fit(const Attention<T>& a) {
  if (a.query_start[0] != 0 || a.query_start[a.num_sequences] > a.rows) return false;
  for (long s = 0; s < a.num_sequences; s++) {
    const long queries = a.query_start[s + 1] - a.query_start[s];
    if (queries < 0 || a.seq_lens[s] < queries || a.seq_lens[s] > (long)a.max_blocks * a.block_size) return false;
  }
  return true;
}

template <class T>
int run_attention(Attention<T>& a) {
  const long used = a.query_start[a.num_sequences], width = (long)a.num_heads * a.head_dim;
  if (!indices_fit(a)) return 1;
  memset((void*)(a.out + used * width), 0, (size_t)((a.rows - used) * width) * sizeof(T));
  a.bad = 0;
  a.plan = liushui::plan_attention(a.threads, a.num_sequences, a.query_start, a.seq_lens, a.num_kv_heads, a.group(),
                                   a.window);
  if (a.plan.num_partials)
    a.partials = (float*)liushui::scratch(liushui::kShared,
                                          (size_t)(a.plan.num_partials * a.partial_width()) * sizeof(float));
  liushui::parallel(a.threads, a.plan.num_tasks, attend_task<T>, &a);
  if (a.plan.num_merges && !a.bad) liushui::parallel(a.threads, a.plan.num_merges, merge_task<T>, &a);
  return a.bad;
}

}  // namespace
