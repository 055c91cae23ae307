// What attention is given, and where the keys and values of a block lie in the paged cache.
#pragma once
#include "amx.h"
#include "attention_block.h"
#include "library.h"

namespace {

using liushui::AttentionTask;
using liushui::kSplit;
static_assert(kSplit % kKeys == 0 && kTileSplit % kKeys == 0, "splits are whole blocks");

// T: arithmetic; K: what the cache holds, T itself or int8 with a scale for each token and head.
template <class T, class K>
struct Attention {
  const T* qkv;
  const K *k_cache, *v_cache;
  const float *k_scales, *v_scales;  // [num_blocks, num_kv_heads, block_size], for int8
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

template <class T, class K>
constexpr bool kScaled = sizeof(K) == 1;
#if defined(LS_BF16)
template <class T>
constexpr bool kTiles = sizeof(T) == 2;
#else
template <class T>
constexpr bool kTiles = false;
#endif

// How a step's attention is cut into tasks.
template <class T>
constexpr liushui::AttentionCut kCut = kTiles<T> ? liushui::AttentionCut{kTileSplit, 384, 16}
                                                 : liushui::AttentionCut{kSplit, 96, 1};

// Where a block's keys and values lie in the cache. Keys are there from `from` to `to`, multiples of Kw.
template <class K>
struct Place {
  const K *keys[kKeys], *values[kKeys];
  alignas(64) float key_scales[kKeys], value_scales[kKeys];
  long from, to;
};

// Integers up to 127 are exact in either type.
template <class T>
LS_INLINE void plain_row(const int8_t* from, long dim, T* to) {
  long d = 0;
  for (; d + W <= dim; d += W) {
#if defined(__AVX512F__)
    store(to + d, (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + d)))));
#elif defined(__AVX2__) && LS_WIDTH == 8
    store(to + d, (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + d)))));
#else
    vi whole;
    for (int i = 0; i < W; i++) whole[i] = from[d + i];
    store(to + d, __builtin_convertvector(whole, vf));
#endif
  }
  for (; d < dim; d++) {
    const vf one = splat((float)from[d]);
    store_n(to + d, one, 1);
  }
}

// Finds keys [from, to) of the block that starts at position `start`; zeros stand in for what is not there.
template <class T, class K>
bool locate(Attention<T, K>& a, const AttentionTask& task, long start, long from, long to, Place<K>& place) {
  alignas(64) static const K nothing[1024] = {};
  const int32_t* table = a.block_table + (long)task.sequence * a.max_blocks;
  place.from = from / Kw * Kw;
  place.to = round_up(to, Kw);
  for (long j = 0; j < from; j++) place.keys[j] = place.values[j] = nothing;
  for (long j = to; j < kKeys; j++) place.keys[j] = place.values[j] = nothing;
  if (kScaled<T, K>) {
    memset(place.key_scales, 0, sizeof place.key_scales);
    memset(place.value_scales, 0, sizeof place.value_scales);
  }
  for (long j = from; j < to;) {  // runs of one cache block
    const long number = table[(start + j) / a.block_size], offset = (start + j) % a.block_size;
    if (number < 0 || number >= a.num_blocks) {
      __atomic_store_n(&a.bad, 1, __ATOMIC_RELAXED);
      return false;
    }
    const long first = (number * a.num_kv_heads + task.head) * a.block_size + offset, end = min_of(to, j + a.block_size - offset);
    if (kScaled<T, K>) {
      memcpy(place.key_scales + j, a.k_scales + first, (size_t)(end - j) * sizeof(float));
      memcpy(place.value_scales + j, a.v_scales + first, (size_t)(end - j) * sizeof(float));
    }
    for (long at = first * a.head_dim; j < end; j++, at += a.head_dim) {
      place.keys[j] = a.k_cache + at;
      place.values[j] = a.v_cache + at;
    }
  }
  return true;
}

}  // namespace
