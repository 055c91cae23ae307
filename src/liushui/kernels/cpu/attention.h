// Causal attention over the paged KV cache, for any mixture of decodes and prompt chunks.
//
// What one query computes is fixed by its own position alone: its keys in blocks of kKeys and splits of kSplit,
// both aligned to absolute positions; the blocks of a split joined by the online softmax, the splits merged in order
// (as Flash-Decoding does, but always). Which rows share a tile, and who computes it, only decides how often keys are
// read. Keys that a query does not see never enter its arithmetic, so whatever a slot held before it was written
// (NaN, say) is harmless.
#pragma once
#include "attention_block.h"
#include "attention_keys.h"
#include "attention_tiled.h"

namespace {

// The state of a task's query rows while they walk over their keys.
struct Rows {
  float *query, *scores;          // [rows, dim] scaled; [kTileRows, kKeys]
  float *sum, *largest, *weight;  // [rows, padded dim] weighted values; [rows] running maximum; [rows] sum of weights
};

// The block that is being worked on.
template <class T, class K>
struct Block {
  Place<K> here, ahead;
  const T *keys[kKeys], *values[kKeys];  // in T: in the cache, or in `plain`
  const float* wide[kKeys];
  T* plain;                     // [2, kKeys, dim]: keys and values of an int8 cache, without their scales
  float *transposed, *widened;  // [dim, kKeys] keys; [kKeys, padded dim] values where need be
  bool in_place;                // few query rows use the values as they lie in the cache
};

// Keys and values of the block as T.
template <class T, class K>
void make_plain(const Attention<T, K>& a, Block<T, K>& block) {
  for (long j = 0; j < kKeys; j++) {
    if constexpr (kScaled<T, K>) {
      T *key = block.plain + j * a.head_dim, *value = block.plain + (kKeys + j) * a.head_dim;
      plain_row(block.here.keys[j], a.head_dim, key);
      plain_row(block.here.values[j], a.head_dim, value);
      for (long d = 0; d < a.head_dim; d += 64) {
        __builtin_prefetch(block.ahead.keys[j] + d);
        __builtin_prefetch(block.ahead.values[j] + d);
      }
      block.keys[j] = key, block.values[j] = value;
    } else {
      block.keys[j] = block.here.keys[j], block.values[j] = block.here.values[j];
    }
  }
}

// Values as whole vectors of floats, for all rows of the task.
template <class T, class K>
void widen_values(const Attention<T, K>& a, Block<T, K>& block) {
  const long dim = a.head_dim, padded = a.padded_dim();
  const bool in_place = sizeof(T) == sizeof(float) && dim % W == 0;
  for (long j = block.here.from; j < block.here.to; j++) {
    float* copy = block.widened + j * padded;
    block.wide[j] = in_place ? (const float*)block.values[j] : copy;
    if (!in_place)
      for (long d = 0; d < dim; d += W) store(copy + d, load_up_to(block.values[j] + d, dim - d));
  }
}

// What rows [row, row + count) of the task see of the block at `start`.
template <class T, class K>
LS_INLINE Sight look(const Attention<T, K>& a, const AttentionTask& task, long start, long row, int count) {
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

template <class T, class K>
void add_block(const Attention<T, K>& a, const Rows& rows, Block<T, K>& block, const Sight& sight, long row, int count) {
  const long dim = a.head_dim, padded = a.padded_dim(), vectors = (sight.last + W - 1) / W;
  const float* query = rows.query + row * dim;
  float *sum = rows.sum + row * padded, keep[kTileRows];
  const auto times = [&](const float* scales) {
    for (int r = 0; r < count; r++)
      for (long j = 0; j < vectors * W; j += W)
        store(rows.scores + r * kKeys + j, load(rows.scores + r * kKeys + j) * load(scales + j));
  };
  tile_rows(count, query, dim, Matrix{block.transposed, kKeys}, 0, dim, rows.scores, kKeys, vectors, nullptr);
  if (kScaled<T, K>) times(block.here.key_scales);
  soften(count, sight, rows.scores, rows.largest + row, rows.weight + row, keep);
  if (kScaled<T, K>) times(block.here.value_scales);
  if (block.in_place)
    add_values(count, sight, rows.scores, Fetching<T>{block.values, (const T* const*)block.ahead.keys}, sum, padded, keep);
  else
    add_values(count, sight, rows.scores, Scattered{block.wide}, sum, padded, keep);
}

// Calls each(start of a block) for the blocks of keys of a split that the task's rows see; `block` holds them.
template <class T, class K, class Each>
bool walk(Attention<T, K>& a, const AttentionTask& task, long split, Block<T, K>& block, const Each& each) {
  const long last = task.position + task.count - 1;
  const long lowest = a.window > 0 ? max_of(0, (long)task.position - a.window + 1) : 0;
  const long begin = max_of(split * kSplit, lowest / kKeys * kKeys), end = min_of((split + 1) * kSplit, last + 1);
  const auto find = [&](long start, Place<K>& place) {
    return locate(a, task, start, min_of(kKeys, max_of(0, lowest - start)), max_of(0, min_of(kKeys, end - start)), place);
  };
  if (!find(begin, block.ahead)) return false;
  fetch_rows(block.ahead.keys, kKeys, a.head_dim);
  for (long start = begin; start < end; start += kKeys) {
    block.here = block.ahead;
    if (!find(start + kKeys, block.ahead)) return false;
    make_plain(a, block);
    each(start);
  }
  return true;
}

template <class T, class K>
void attend_split(Attention<T, K>& a, const AttentionTask& task, long split, const Rows& rows, Block<T, K>& block) {
  const long count = (long)task.count * a.group(), padded = a.padded_dim();
  memset(rows.sum, 0, (size_t)(count * padded) * sizeof(float));
  for (long r = 0; r < count; r++) {
    rows.largest[r] = -__builtin_inff();
    rows.weight[r] = 0.0f;
  }
  walk(a, task, split, block, [&](long start) {
    transpose_keys(block.keys, block.values, block.here.from, block.here.to, a.head_dim, block.transposed);
    if (!block.in_place) widen_values(a, block);
    for (long row = 0; row < count; row += kTileRows) {
      const int height = (int)min_of(kTileRows, count - row);
      const Sight sight = look(a, task, start, row, height);
      if (sight.last > 0) add_block(a, rows, block, sight, row, height);
    }
  });
}

template <class T, class K>
void write_out(const Attention<T, K>& a, const AttentionTask& task, long row, const float* sum, float weight) {
  const long group = a.group(), head = task.head * group + row % group;
  T* out = a.out + ((task.row + row / group) * a.num_heads + head) * a.head_dim;
  for (long d = 0; d < a.head_dim; d += W) store_up_to(out + d, load(sum + d) / weight, a.head_dim - d);
}

template <class T, class K>
void gather_queries(const Attention<T, K>& a, const AttentionTask& task, float* query) {
  const long group = a.group(), dim = a.head_dim;
  for (long r = 0; r < task.count * group; r++) {
    const T* from = a.qkv + (task.row + r / group) * a.qkv_stride + (task.head * group + r % group) * dim;
    for (long d = 0; d < dim; d += W)
      store_up_to(query + r * dim + d, load_up_to(from + d, dim - d) * a.scale, dim - d);
  }
}

// Hands the rows' state to whoever merges the splits.
template <class T, class K>
void write_partial(const Attention<T, K>& a, const AttentionTask& task, const Rows& rows) {
  const long padded = a.padded_dim();
  float* to = a.partials + task.partial * a.partial_width();
  for (long r = 0; r < (long)task.count * a.group(); r++, to += a.partial_width()) {
    memcpy(to, rows.sum + r * padded, (size_t)padded * sizeof(float));
    to[padded] = rows.largest[r];
    to[padded + 1] = rows.weight[r];
  }
}

template <class T, class K>
void attend_task(void* context, long index) {
  Attention<T, K>& a = *(Attention<T, K>*)context;
  const AttentionTask& task = a.plan.tasks[index];
#if defined(LS_BF16)
  if constexpr (kTiles<T>) return attend_task_tiled(a, index, false);
#endif
  const long count = (long)task.count * a.group(), dim = a.head_dim, padded = a.padded_dim();
  const long sizes[] = {count * dim, kTileRows * kKeys, count * padded, count, count, dim * kKeys,
                        kKeys * padded, count * padded, count, count, kScaled<T, K> ? 2 * kKeys * dim : 0};
  float* part[11];
  long total = 0;
  for (long size : sizes) total += round_up(size, 16);
  part[0] = (float*)liushui::scratch(liushui::kWork, (size_t)total * sizeof(float));
  for (int i = 1; i < 11; i++) part[i] = part[i - 1] + round_up(sizes[i - 1], 16);
  const Rows rows = {part[0], part[1], part[2], part[3], part[4]};
  Block<T, K> block;
  block.plain = (T*)part[10];
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

template <class T, class K>
void merge_task(void* context, long index) {
  Attention<T, K>& a = *(Attention<T, K>*)context;
  const AttentionTask& task = a.plan.merges[index];
#if defined(LS_BF16)
  if constexpr (kTiles<T>) return attend_task_tiled(a, index, true);
#endif
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
template <class T, class K>
bool indices_fit(const Attention<T, K>& a) {
  if (a.query_start[0] != 0 || a.query_start[a.num_sequences] > a.rows) return false;
  for (long s = 0; s < a.num_sequences; s++) {
    const long queries = a.query_start[s + 1] - a.query_start[s];
    if (queries < 0 || a.seq_lens[s] < queries || a.seq_lens[s] > (long)a.max_blocks * a.block_size) return false;
  }
  return true;
}

template <class T, class K>
int run_attention(Attention<T, K>& a) {
  const long used = a.query_start[a.num_sequences], width = (long)a.num_heads * a.head_dim;
  if (!indices_fit(a)) return 1;
  memset((void*)(a.out + used * width), 0, (size_t)((a.rows - used) * width) * sizeof(T));
  a.bad = 0;
  a.plan = liushui::plan_attention(a.threads, a.num_sequences, a.query_start, a.seq_lens, a.num_kv_heads, a.group(),
                                   a.window, kCut<T>);
  if (a.plan.num_partials)
    a.partials = (float*)liushui::scratch(liushui::kShared,
                                          (size_t)(a.plan.num_partials * a.partial_width()) * sizeof(float));
  liushui::parallel(a.threads, a.plan.num_tasks, attend_task<T, K>, &a);
  if (a.plan.num_merges && !a.bad) liushui::parallel(a.threads, a.plan.num_merges, merge_task<T, K>, &a);
  return a.bad;
}

}  // namespace
