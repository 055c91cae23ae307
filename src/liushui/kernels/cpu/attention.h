// Causal attention over the paged KV cache, for any mixture of decodes and prompt chunks.
//
// What one query computes is fixed by its own position alone: its keys in blocks of kKeys and splits of kSplit,
// both aligned to absolute positions; in a block, scores by one accumulator over the head dimension, the online
// softmax (Milakov and Gimelshein, 2018), and the weighted sum of values by one accumulator over the keys; splits
// merged in order (as Flash-Decoding does, but always). Which rows share a tile, and who computes it, only decides
// how often keys are read. Keys that a query does not see never enter its arithmetic, so whatever a slot held
// before it was written (NaN, say) is harmless.
#pragma once
#include "library.h"
#include "simd.h"

namespace {

using liushui::AttentionTask;
using liushui::kSplit;

constexpr int kKeys = 64;
constexpr int kTileRows = 6;
static_assert(kSplit % kKeys == 0 && kKeys % W == 0, "splits are whole blocks of whole vectors");

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

// out[r][0 .. N vectors) = out * keep[r] + sum over k in [from, to) of a[r][k] * b(k), in the order of k.
template <int M, int N, class B>
LS_INLINE void tile(const float* a, long lda, B b, long from, long to, float* out, long ldo, const float* keep) {
  vf sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) sum[r][c] = keep ? load(out + r * ldo + c * W) * keep[r] : vf{};
  for (long k = from; k < to; k++) {
    const float* row = b(k);
    vf right[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) right[c] = load(row + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const vf left = splat(a[r * lda + k]);
#pragma GCC unroll 8
      for (int c = 0; c < N; c++) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) store(out + r * ldo + c * W, sum[r][c]);
}

// All columns of M rows, as many vectors at a time as the registers hold.
template <int M, class B>
void tile_columns(const float* a, long lda, B b, long from, long to, float* out, long ldo, long vectors,
                  const float* keep) {
  constexpr int kWide = (LS_REGISTERS - 4) / M;
  constexpr int kMost = kWide >= 8 ? 8 : kWide >= 4 ? 4 : kWide >= 2 ? 2 : 1;
  long c = 0;
  const auto at = [&](long k) { return b(k) + c * W; };
  for (; c + kMost <= vectors; c += kMost) tile<M, kMost>(a, lda, at, from, to, out + c * W, ldo, keep);
  if constexpr (kMost > 4)
    for (; c + 4 <= vectors; c += 4) tile<M, 4>(a, lda, at, from, to, out + c * W, ldo, keep);
  if constexpr (kMost > 2)
    for (; c + 2 <= vectors; c += 2) tile<M, 2>(a, lda, at, from, to, out + c * W, ldo, keep);
  for (; c < vectors; c++) tile<M, 1>(a, lda, at, from, to, out + c * W, ldo, keep);
}

template <class B>
void tile_rows(int rows, const float* a, long lda, B b, long from, long to, float* out, long ldo, long vectors,
               const float* keep) {
  switch (rows) {
    case 1: return tile_columns<1>(a, lda, b, from, to, out, ldo, vectors, keep);
    case 2: return tile_columns<2>(a, lda, b, from, to, out, ldo, vectors, keep);
    case 3: return tile_columns<3>(a, lda, b, from, to, out, ldo, vectors, keep);
    case 4: return tile_columns<4>(a, lda, b, from, to, out, ldo, vectors, keep);
    case 5: return tile_columns<5>(a, lda, b, from, to, out, ldo, vectors, keep);
    default: return tile_columns<6>(a, lda, b, from, to, out, ldo, vectors, keep);
  }
}

// The state of a tile of query rows while it walks over its keys.
struct Rows {
  float *query, *scores;          // [rows, dim] scaled; [kTileRows, kKeys]
  float *sum, *largest, *weight;  // [rows, padded dim] weighted values; [rows] running maximum; [rows] sum of weights
};

// A block of keys and values: keys transposed, so that lanes are keys.
struct Block {
  float *keys, *copied;           // [dim, kKeys]; [kKeys, padded dim] where values must be widened
  const float* values[kKeys];
};

#if defined(__AVX2__)
LS_INLINE void transpose_8x8(const __m256* in, float* out, long ldo) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * ldo, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * ldo, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

LS_INLINE __m256 load_8(const float* p) { return _mm256_loadu_ps(p); }
LS_INLINE __m256 load_8(const bf16* p) {
  const __m128i bits = _mm_loadu_si128((const __m128i*)p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

LS_INLINE float widen(float x) { return x; }
LS_INLINE float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Turns `count` key rows (a multiple of 8) into columns.
template <class T>
LS_INLINE void transpose_keys(const T* const* rows, long count, long dim, float* out) {
  long d = 0;
#if defined(__AVX2__)
  for (; d + 8 <= dim; d += 8)
    for (long j = 0; j < count; j += 8) {
      __m256 in[8];
      for (int i = 0; i < 8; i++) in[i] = load_8(rows[j + i] + d);
      transpose_8x8(in, out + d * kKeys + j, kKeys);
    }
#elif defined(__aarch64__)
  for (; d + 4 <= dim; d += 4)
    for (long j = 0; j < count; j += 4) {
      const float32x4_t a = (float32x4_t)load(rows[j] + d), b = (float32x4_t)load(rows[j + 1] + d);
      const float32x4_t c = (float32x4_t)load(rows[j + 2] + d), e = (float32x4_t)load(rows[j + 3] + d);
      const float32x4x2_t ab = vtrnq_f32(a, b), ce = vtrnq_f32(c, e);
      float* to = out + d * kKeys + j;
      vst1q_f32(to, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(ce.val[0])));
      vst1q_f32(to + kKeys, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(ce.val[1])));
      vst1q_f32(to + 2 * kKeys, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(ce.val[0])));
      vst1q_f32(to + 3 * kKeys, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(ce.val[1])));
    }
#endif
  for (; d < dim; d++)
    for (long j = 0; j < count; j++) out[d * kKeys + j] = widen(rows[j][d]);
}

LS_INLINE const float* value_row(const float* row, float* copy, long dim) {
  if (dim % W == 0) return row;
  memcpy(copy, row, (size_t)dim * sizeof(float));
  return copy;
}
LS_INLINE const float* value_row(const bf16* row, float* copy, long dim) {
  for (long d = 0; d < dim; d += W) store(copy + d, load_up_to(row + d, dim - d));
  return copy;
}

// Fetches keys [from, to) of the block of keys that starts at position `start`.
template <class T>
bool fetch(Attention<T>& a, const AttentionTask& task, long start, long from, long to, Block& block) {
  static const T nothing[1024] = {};
  const T* rows[kKeys];
  const int32_t* table = a.block_table + (long)task.sequence * a.max_blocks;
  const long dim = a.head_dim;
  for (long j = from / 8 * 8; j < round_up(to, 8); j++) {
    if (j < from || j >= to) {  // fills the last group of 8 of the transposition; masked later
      rows[j] = nothing;
      continue;
    }
    const long position = start + j, number = table[position / a.block_size];
    if (number < 0 || number >= a.num_blocks) {
      __atomic_store_n(&a.bad, 1, __ATOMIC_RELAXED);
      return false;
    }
    const long place = ((number * a.num_kv_heads + task.head) * a.block_size + position % a.block_size) * dim;
    rows[j] = a.k_cache + place;
    block.values[j] = value_row(a.v_cache + place, block.copied + j * a.padded_dim(), dim);
  }
  const long first = from / 8 * 8;
  transpose_keys(rows + first, round_up(to, 8) - first, dim, block.keys + first);
  return true;
}

// Online softmax of one row over its keys [from, to) of the block: scores become weights; returns by how much what
// was summed before must be scaled.
LS_INLINE float soften(float* scores, long from, long to, long vectors, float& largest, float& weight) {
  const float lowest = -__builtin_inff();
  for (long j = 0; j < from; j++) scores[j] = lowest;
  for (long j = to; j < vectors * W; j++) scores[j] = lowest;
  vf most = splat(lowest);
  for (long v = 0; v < vectors; v++) most = vmax(most, load(scores + v * W));
  const float before = largest, now = lane_max(most);
  largest = now > before ? now : before;
  vf total = {};
  for (long v = 0; v < vectors; v++) {
    const vf p = vexp(load(scores + v * W) - largest);
    store(scores + v * W, p);
    total = total + p;
  }
  const float keep = weight == 0.0f ? 0.0f : vexp(splat(before - largest))[0];
  weight = weight * keep + lane_sum(total);
  return keep;
}

// Adds one block of keys to rows [row, row + count) of the task.
template <class T>
void add_block(const Attention<T>& a, const AttentionTask& task, const Rows& rows, const Block& block, long start,
               long row, int count) {
  const long dim = a.head_dim, padded = a.padded_dim();
  long from[kTileRows], to[kTileRows], all_from = 0, all_to = kKeys, last = 0;
  for (int r = 0; r < count; r++) {
    const long position = task.position + (row + r) / a.group();
    from[r] = a.window > 0 ? max_of(0, position - a.window + 1 - start) : 0;
    to[r] = min_of(kKeys, position + 1 - start);
    if (from[r] >= to[r]) from[r] = to[r] = 0;
    all_from = max_of(all_from, from[r]);
    all_to = min_of(all_to, to[r]);
    last = max_of(last, to[r]);
  }
  if (last == 0) return;
  const long vectors = (last + W - 1) / W;
  float* scores = rows.scores;
  const float* keys = block.keys;
  tile_rows(count, rows.query + row * dim, dim, [=](long d) { return keys + d * kKeys; }, 0, dim, scores, kKeys,
            vectors, nullptr);
  float keep[kTileRows];
  for (int r = 0; r < count; r++)
    keep[r] = from[r] < to[r] ? soften(scores + r * kKeys, from[r], to[r], vectors, rows.largest[row + r],
                                       rows.weight[row + r])
                              : 1.0f;
  const auto value = [&](long j) { return block.values[j]; };
  const float ones[kTileRows] = {1, 1, 1, 1, 1, 1};
  float* sum = rows.sum + row * padded;
  const bool shared = all_from < all_to;  // keys that all rows see; what a row sees besides, it adds alone
  for (int r = 0; r < count; r++) {
    const long end = shared ? all_from : to[r];
    if (from[r] < end)
      tile_rows(1, scores + r * kKeys, 0, value, from[r], end, sum + r * padded, 0, padded / W, keep + r);
    if (from[r] < end || from[r] >= to[r]) keep[r] = 1.0f;
  }
  if (!shared) return;
  tile_rows(count, scores, kKeys, value, all_from, all_to, sum, padded, padded / W, keep);
  for (int r = 0; r < count; r++)
    if (all_to < to[r])
      tile_rows(1, scores + r * kKeys, 0, value, all_to, to[r], sum + r * padded, 0, padded / W, ones);
}

template <class T>
void attend_split(Attention<T>& a, const AttentionTask& task, long split, const Rows& rows, Block& block) {
  const long count = (long)task.count * a.group(), padded = a.padded_dim();
  const long last = task.position + task.count - 1;
  const long lowest = a.window > 0 ? max_of(0, (long)task.position - a.window + 1) : 0;
  const long begin = max_of(split * kSplit, lowest / kKeys * kKeys), end = min_of((split + 1) * kSplit, last + 1);
  memset(rows.sum, 0, (size_t)(count * padded) * sizeof(float));
  for (long r = 0; r < count; r++) {
    rows.largest[r] = -__builtin_inff();
    rows.weight[r] = 0.0f;
  }
  for (long start = begin; start < end; start += kKeys) {
    if (!fetch(a, task, start, max_of(0, lowest - start), min_of(kKeys, end - start), block)) return;
    for (long row = 0; row < count; row += kTileRows)
      add_block(a, task, rows, block, start, row, (int)min_of(kTileRows, count - row));
  }
}

// (sum, largest, weight) of one row joined with those of the next split.
LS_INLINE void merge(float* sum, float& largest, float& weight, const float* more, float more_largest,
                     float more_weight, long padded) {
  if (more_weight == 0.0f) return;  // saw no key
  if (weight == 0.0f) {
    memcpy(sum, more, (size_t)padded * sizeof(float));
    largest = more_largest;
    weight = more_weight;
    return;
  }
  const float joint = largest > more_largest ? largest : more_largest;
  const float keep = vexp(splat(largest - joint))[0], add = vexp(splat(more_largest - joint))[0];
  for (long d = 0; d < padded; d += W) store(sum + d, fma(load(more + d), splat(add), load(sum + d) * keep));
  weight = weight * keep + more_weight * add;
  largest = joint;
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
  Block block;
  block.keys = part[5];
  block.copied = part[6];
  if (padded > dim) memset(block.copied, 0, (size_t)(kKeys * padded) * sizeof(float));
  float *sum = part[7], *largest = part[8], *weight = part[9];
  memset(weight, 0, (size_t)count * sizeof(float));
  gather_queries(a, task, rows.query);
  for (long split = task.split_begin; split < task.split_end; split++) {
    attend_split(a, task, split, rows, block);
    if (task.partial >= 0) {
      float* to = a.partials + task.partial * a.partial_width();
      for (long r = 0; r < count; r++, to += a.partial_width()) {
        memcpy(to, rows.sum + r * padded, (size_t)padded * sizeof(float));
        to[padded] = rows.largest[r];
        to[padded + 1] = rows.weight[r];
      }
      return;
    }
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
