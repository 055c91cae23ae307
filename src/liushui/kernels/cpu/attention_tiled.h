// Attention's tasks for bfloat16: walks over the splits of keys that a task's rows see (see attention_tiles.h).
#pragma once
#include "attention_amx.h"
#include "attention_keys.h"
#include "attention_pairs.h"

#if defined(LS_BF16)
namespace {

// Work space of a task; L lanes of rows in each of `tiles` tiles.
struct TileSpace {
  bf16 *queries;           // [tile][chunk][pair of dimensions][L][2]
  float* scores[2];        // [kTileSplit][L], of two tiles
  bf16* values;            // [kSplitBlocks][tile of dimensions], as turn_values or pair_values make them
  bf16 *keys, *rows;       // [kTileSplit][chunks * 32], [kKeys][padded]: where the cache cannot be read as it is
  float *sum, *more;       // [tile][padded][L], [2][padded][L]; of few rows [L][padded]
  LaneState* state;        // [tile]
  bf16* seen;              // as values, and `trial` as sums: for rows one by one
  float* trial;
  float *key_scales, *value_scales;  // [kTileSplit]
};

// A split's keys. Of those from `first` on (a position), [from, to) are there, in blocks [begin, end).
template <class K>
struct SplitKeys {
  Place<K> places[kSplitBlocks];
  KeyTile tiles[2 * kSplitBlocks];
  int finite[kSplitBlocks];  // of a block's values; -1: not known
  long first, from, to, begin, end;
};

template <int L>
TileSpace divide_scratch(const TaskShape& t, bool copies, bool scaled) {
  const long value_floats = kSplitBlocks * t.columns * 256;
  const long sizes[] = {t.tiles * t.chunks * 16 * L, kTileSplit * L, kTileSplit * L, value_floats,
                        copies ? kTileSplit * t.chunks * 16 : 0, kKeys * t.padded / 2, t.tiles * t.padded * L,
                        2 * t.padded * L, t.tiles * (long)sizeof(LaneState) / 4, value_floats, t.padded * L,
                        scaled ? kTileSplit : 0, scaled ? kTileSplit : 0};
  constexpr int kParts = sizeof sizes / sizeof *sizes;
  float* part[kParts];
  long total = 0;
  for (long size : sizes) total += round_up(size, 16);
  part[0] = (float*)liushui::scratch(liushui::kWork, (size_t)total * sizeof(float));
  for (int i = 1; i < kParts; i++) part[i] = part[i - 1] + round_up(sizes[i - 1], 16);
  return {(bf16*)part[0], {part[1], part[2]}, (bf16*)part[3], (bf16*)part[4], (bf16*)part[5], part[6], part[7],
          (LaneState*)part[8], (bf16*)part[9], part[10], scaled ? part[11] : nullptr, scaled ? part[12] : nullptr};
}

// Calls each(i, token, head) for rows [row, row + count) of a task, with the token's and the head's number in it.
template <class Each>
LS_INLINE void each_row(long row, long count, long group, const Each& each) {
  long token = row / group, head = row % group;
  for (long i = 0; i < count; i++) {
    each(i, token, head);
    if (++head == group) head = 0, token++;
  }
}

// Queries as the second factor, zeros for rows that are not there. The sign of the scale goes to them, so that the
// highest score is that of the highest product.
template <int L, class K>
void pack_queries(const Attention<bf16, K>& a, const AttentionTask& task, const TaskShape& t, bf16* out) {
  const uint32_t flip = a.scale < 0.0f ? 0x80008000u : 0;
  const bf16* first = a.qkv + task.row * a.qkv_stride + task.head * a.group() * t.dim;
  for (long tile = 0; tile < t.tiles; tile++) {
    const bf16* from[L];
    const long count = min_of(L, t.count - tile * L);
    each_row(tile * L, count, a.group(),
             [&](long i, long token, long head) { from[i] = first + token * a.qkv_stride + head * t.dim; });
    alignas(64) uint32_t words[16][16] = {};
    for (long c = 0; c < t.chunks; c++, out += 32 * L) {
      const long part = min_of(32, t.dim - c * 32);
      for (long i = 0; i < count; i++) {
        if (part < 32) memset(words[i], 0, sizeof words[i]);
        memcpy(words[i], (const void*)(from[i] + c * 32), (size_t)part * sizeof(bf16));
        for (int w = 0; w < 16; w++) words[i][w] ^= flip;
      }
      if constexpr (L == 16) {
        transpose_words(words[0], 16, (uint32_t*)out);
      } else {
        for (int w = 0; w < 16; w++)
          for (int i = 0; i < L; i++) memcpy((void*)(out + 2 * (w * L + i)), &words[i][w], 4);
      }
    }
  }
}

// Finds the keys and values of a split; false where the block table points outside the cache.
template <class K>
bool find_split(Attention<bf16, K>& a, const AttentionTask& task, long split, SplitKeys<K>& keys) {
  const long lowest = a.window > 0 ? max_of(0, (long)task.position - a.window + 1) : 0;
  keys.first = split * kTileSplit;
  keys.from = max_of(0, lowest - keys.first);
  keys.to = min_of(kTileSplit, task.position + task.count - keys.first);
  keys.begin = keys.from / kKeys;
  keys.end = (keys.to + kKeys - 1) / kKeys;
  for (long b = keys.begin; b < keys.end; b++) {
    const long at = b * kKeys;
    if (!locate(a, task, keys.first + at, max_of(0, keys.from - at), min_of(kKeys, keys.to - at), keys.places[b]))
      return false;
    keys.finite[b] = -1;
  }
  return true;
}

// Whether tiles can read keys as they lie in the cache.
template <class K>
bool keys_in_place(const Attention<bf16, K>& a) {
  return sizeof(K) == 2 && a.head_dim % 32 == 0 && a.block_size % 16 == 0;
}

// Rows of `width` elements, zeros after dim: for tiles that reach further than a head, or an int8 cache.
template <class K>
void copy_rows(const K* const* from, long dim, long width, bf16* to) {
  for (long j = 0; j < kKeys; j++, to += width) {
    if constexpr (sizeof(K) == 1)
      plain_row(from[j], dim, to);
    else
      memcpy((void*)to, (const void*)from[j], (size_t)dim * sizeof(bf16));
    memset((void*)(to + dim), 0, (size_t)(width - dim) * sizeof(bf16));
  }
}

// Where tiles read a block's keys: in the cache, or in a copy.
template <class K>
void place_keys(const TaskShape& t, long b, bool in_place, SplitKeys<K>& keys, bf16* copies) {
  KeyTile* tiles = keys.tiles + 2 * b;
  if constexpr (sizeof(K) == 2) {
    for (int half = 0; half < 2 && in_place; half++) {
      // What lies between keys that are there is in the same block of the cache; its scores are hidden.
      const long begin = b * kKeys + half * 16, there = max_of(begin, keys.from) - begin;
      const bool any = begin + there < min_of(keys.to, begin + 16);
      const K* row = keys.places[b].keys[half * 16 + (any ? there : 0)];
      tiles[half] = any ? KeyTile{row - there * t.dim, t.dim * 2} : KeyTile{row, 0};
    }
  }
  if (in_place) return;
  bf16* to = copies + b * kKeys * t.chunks * 32;
  copy_rows(keys.places[b].keys, t.dim, t.chunks * 32, to);
  for (int half = 0; half < 2; half++) tiles[half] = {to + half * 16 * t.chunks * 32, t.chunks * 64};
}

// A block's values, as the sums take them.
template <int L, class K>
void place_values(const TaskShape& t, const Place<K>& place, bf16* copies, bf16* out) {
  const bf16 *copied[kKeys], *const *rows = copied;
  if (sizeof(K) == 1 || t.dim < t.padded) {
    copy_rows(place.values, t.dim, t.padded, copies);
    for (long j = 0; j < kKeys; j++) copied[j] = copies + j * t.padded;
  } else {
    rows = (const bf16* const*)place.values;
  }
  if constexpr (L == 16)
    for (long d = 0; d < t.padded; d += 8) turn_values(rows, d, out + d * kKeys);
  else
    for (long d = 0; d < t.padded; d += 32) pair_values(rows, d, out + d * kKeys);
}

// Brings the keys and values of a split that was found before the tiles. Memory is kept busy: while a block's values are
// turned, its keys and the values of a later one are fetched.
template <int L, class K>
void prepare_split(const Attention<bf16, K>& a, const TaskShape& t, const TileSpace& s, SplitKeys<K>& keys) {
  constexpr long kAhead = 2;
  const bool in_place = keys_in_place(a);
  for (long b = keys.begin; b < min_of(keys.end, keys.begin + kAhead); b++)
    fetch_rows<kFetchNear>(keys.places[b].values, kKeys, t.dim);
  for (long b = keys.begin; b < keys.end; b++) {
    fetch_rows<kFetchNear>(keys.places[b].keys, kKeys, t.dim);
    if (b + kAhead < keys.end) fetch_rows<kFetchNear>(keys.places[b + kAhead].values, kKeys, t.dim);
    place_values<L>(t, keys.places[b], s.rows, s.values + b * t.columns * 512);
    if (kScaled<bf16, K>) {
      memcpy(s.key_scales + b * kKeys, keys.places[b].key_scales, kKeys * sizeof(float));
      memcpy(s.value_scales + b * kKeys, keys.places[b].value_scales, kKeys * sizeof(float));
    }
  }
  for (long b = keys.begin; b < keys.end; b++) place_keys(t, b, in_place, keys, s.keys);
}

// Whether the next split is found, and its keys and values fetched, while one of L rows is computed.
template <int L>
constexpr bool kFetchNext = kFetchLater && L < 16;

// The split that comes next: the task's own, or the first of `next` (which may be null). Null where it is not wanted, or
// not there.
template <int L, class K>
const SplitKeys<K>* find_later(Attention<bf16, K>& a, const AttentionTask& task, long split, const AttentionTask* next,
                               SplitKeys<K>& keys) {
  if (!kFetchNext<L>) return nullptr;
  const bool own = split < task.split_end;
  if (!own && !next) return nullptr;
  return find_split(a, own ? task : *next, own ? split : next->split_begin, keys) ? &keys : nullptr;
}

// Fetches block b of a later split, counted from its first: values or keys.
template <int L, class K>
LS_INLINE void fetch_later(const SplitKeys<K>* later, const TaskShape& t, long b, bool values) {
  if (!kFetchNext<L> || !later || later->begin + b >= later->end) return;
  const Place<K>& place = later->places[later->begin + b];
  fetch_rows<kFetchNear>(values ? place.values : place.keys, kKeys, t.dim);
}

// What the rows of a tile see of the split at position `first`.
template <int L, class K>
LaneSight look_at_split(const Attention<bf16, K>& a, const AttentionTask& task, long first, long row, long count) {
  LaneSight s;
  s.all_from = s.first = 0;
  s.all_to = s.last = kTileSplit;
  for (int lane = 0; lane < W; lane++) s.from[lane] = 0, s.to[lane] = kTileSplit;
  const long before = task.position - first, rows = min_of(L, count - row), group = a.group();
  const long low = before + row / group, high = before + (row + rows - 1) / group;
  if (low >= kTileSplit - 1 && (a.window == 0 || high < a.window)) return s;
  s.first = kTileSplit, s.last = 0;
  each_row(row, rows, group, [&](long i, long token, long) {
    const long position = before + token;
    long from = a.window > 0 ? max_of(0, position - a.window + 1) : 0, to = max_of(0, min_of(kTileSplit, position + 1));
    if (from >= to) from = to = 0;
    for (long lane = i; lane < W; lane += L) s.from[lane] = (int32_t)from, s.to[lane] = (int32_t)to;
    s.all_from = max_of(s.all_from, from), s.all_to = min_of(s.all_to, to);
    s.last = max_of(s.last, to);
    if (to > 0) s.first = min_of(s.first, from);
  });
  return s;
}

// The sums of one tile of rows over blocks [begin, end), each row with the values that it sees: the slow way, where
// one that it does not see is not finite.
template <int L>
void sum_one_by_one(const TaskShape& t, const TileSpace& s, const LaneSight& sight, long begin, long end,
                    const float* weights, float* sum) {
  const long size = t.columns * 512;
  for (int r = 0; r < L; r++) {
    for (long i = begin * size; i < end * size; i++) {
      const long key = i / size * kKeys + (L == 16 ? i % kKeys : i / 32 % 16 * 2 + i % 2);
      s.seen[i] = key >= sight.from[r] && key < sight.to[r] ? s.values[i] : bf16{0};
    }
    sum_blocks<L>(t, s.seen, begin, end, weights, s.trial, [](long, int, int) {});
    if constexpr (L == 16)
      for (long d = 0; d < t.padded; d++) sum[d * L + r] = s.trial[d * L + r];
    else
      memcpy(sum + r * t.padded, s.trial + r * t.padded, (size_t)t.padded * sizeof(float));
  }
}

// Whether a value that some row of the tile does not see could spoil it.
template <class K>
bool spoils(const TaskShape& t, const TileSpace& s, const LaneSight& sight, long begin, long end, SplitKeys<K>& keys) {
  bool any = false;
  for (long b = begin; b < end; b++) {
    if (sight.all(b)) continue;
    if (keys.finite[b] < 0) keys.finite[b] = all_finite(s.values + b * t.columns * 512, t.columns * 512);
    any |= !keys.finite[b];
  }
  return any;
}

// The scores of one tile of rows, or of two, over blocks [begin, end), and their maxima.
template <int L, bool two, class K>
LS_INLINE void score_blocks(const TaskShape& t, const SplitKeys<K>& keys, const SplitKeys<K>* later,
                            const bf16* queries, const TileSpace& s, long begin, long end, const LaneSight* sight,
                            vf (*most)[4]) {
  constexpr long kBlock = kKeys * L;
  const bf16* queries2 = queries + t.chunks * 32 * L;
  const auto shape = [&](long b) {
    for (int n = 0; n < (two ? 2 : 1); n++) hide<L>(s.scores[n] + b * kBlock, b, sight[n], s.key_scales, most[n]);
  };
  begin_scores<two>(t, queries, queries2);
  for (long b = begin; b < end; b++) {  // vectors follow the tiles at a distance of one block
    float *to = s.scores[0] + b * kBlock, *to2 = s.scores[1] + b * kBlock;
    if (b + 1 < end) fetch_keys(keys.tiles + 2 * (b + 1), t.dim);
    fetch_later<L>(later, t, b - begin, true);
    block_scores<L, two>(t, keys.tiles + 2 * b, queries, queries2, to, to2);
    if (b > begin) shape(b - 1);
  }
  if (begin < end) shape(end - 1);
}

// One tile of rows, or two, over a split that is prepared: their sums to sum[0] and sum[1], their states.
template <int L, bool two, class K>
void attend_tiles(const Attention<bf16, K>& a, const AttentionTask& task, const TaskShape& t, long tile,
                  const TileSpace& s, SplitKeys<K>& keys, const SplitKeys<K>* later, float* const* sum,
                  LaneState* state) {
  constexpr int kTiles = two ? 2 : 1;
  const float scale = __builtin_fabsf(a.scale) * 1.44269504f;  // weights are powers of two
  LaneSight sight[2];
  long first = kTileSplit, last = 0;
  for (int n = 0; n < kTiles; n++) {
    sight[n] = look_at_split<L>(a, task, keys.first, (tile + n) * L, t.count);
    first = min_of(first, sight[n].first), last = max_of(last, sight[n].last);
  }
  const long begin = first / kKeys, end = (last + kKeys - 1) / kKeys;
  vf most[2][4], total[2][4] = {}, level[2];
  for (int n = 0; n < kTiles; n++)
    for (int i = 0; i < 4; i++) most[n][i] = splat(-__builtin_inff());
  score_blocks<L, two>(t, keys, later, s.queries + tile * t.chunks * 32 * L, s, begin, end, sight, most);
  for (int n = 0; n < kTiles; n++) {
    const vf highest = most_of_rows<L>(vmax(vmax(most[n][0], most[n][1]), vmax(most[n][2], most[n][3])));
    const vf nothing = splat(-__builtin_inff()), top = select((vi)(highest == nothing), nothing, highest * scale);
    store(state[n].level, top);
    level[n] = select((vi)(top == nothing), splat(0.0f), top);
  }
  for (int n = 0; n < kTiles; n++) {
    sum_blocks<L>(t, s.values, begin, end, s.scores[n], sum[n], [&](long b, int part, int parts) {
      const float* value_scales = s.value_scales ? s.value_scales + b * kKeys : nullptr;
      if (part == 0) fetch_later<L>(later, t, b - begin, false);
      weigh<L>(s.scores[n] + b * kKeys * L, scale, level[n], value_scales, total[n], part, parts);
    });
    store(state[n].weight, sum_of_rows<L>(total[n]));
    if (spoils(t, s, sight[n], begin, end, keys))
      sum_one_by_one<L>(t, s, sight[n], begin, end, s.scores[n], sum[n]);
  }
}

// A tile's rows, divided by their weights, to where they belong.
template <int L, class K>
void write_tile(const Attention<bf16, K>& a, const AttentionTask& task, const TaskShape& t, long tile, float* sum,
                const LaneState& state) {
  const long count = min_of(L, t.count - tile * L), width = a.num_heads * t.dim;
  bf16 *first = a.out + task.row * width + task.head * a.group() * t.dim, *out[L];
  each_row(tile * L, count, a.group(),
           [&](long i, long token, long head) { out[i] = first + token * width + head * t.dim; });
  if constexpr (L == 16) {
    const vf share = 1.0f / load(state.weight);
    for (long d = 0; d < t.padded; d += 32) {  // as pairs of dimensions: half as many words to turn
      alignas(64) uint32_t pairs[16][16] = {}, rows[16][16];
      for (long j = 0; j < min_of(16, (t.padded - d) / 2); j++) {
        const float* from = sum + (d + 2 * j) * L;
        store_pair((bf16*)pairs[j], fma(load(from), share, vf{}), fma(load(from + L), share, vf{}));
      }
      transpose_words(pairs[0], 16, rows[0]);
      const size_t bytes = (size_t)min_of(32, t.dim - d) * sizeof(bf16);
      for (long i = 0; i < count; i++)
        bytes == 64 ? memcpy((void*)(out[i] + d), rows[i], 64) : memcpy((void*)(out[i] + d), rows[i], bytes);
    }
  } else {
    const vf shares = 1.0f / load(state.weight);
    for (long i = 0; i < count; i++)
      for (long d = 0; d < t.padded; d += 32) {
        const float* from = sum + i * t.padded + d;
        float mean[32], in_order[32];
        for (int j = 0; j < 32; j += W) store(mean + j, fma(load(from + j), splat(shares[i]), vf{}));
        for (int j = 0; j < 32; j++) in_order[j] = mean[paired_place(j)];
        for (long j = 0; j < 32 && d + j < t.dim; j += W)
          store_up_to(out[i] + d + j, load(in_order + j), t.dim - d - j);
      }
  }
}

// `next`: the task that this thread is likely to get after this one, or null.
template <int L, class K>
void attend_lanes(Attention<bf16, K>& a, const AttentionTask& task, const TaskShape& t, const AttentionTask* next) {
  const TileSpace s = divide_scratch<L>(t, !keys_in_place(a), kScaled<bf16, K>);
  constexpr long kBuffers = kFetchNext<L> ? 2 : 1;
  SplitKeys<K> found[kBuffers];
  const SplitKeys<K>* later = nullptr;
  pack_queries<L>(a, task, t, s.queries);
  configure_attention(L);
  for (long split = task.split_begin; split < task.split_end; split++) {
    const long turn = split - task.split_begin;
    SplitKeys<K>& keys = found[turn % kBuffers];
    if (!later && !find_split(a, task, split, keys)) {
      LS_TILE_RELEASE();
      return;
    }
    prepare_split<L>(a, t, s, keys);
    later = find_later<L>(a, task, split + 1, next, found[(turn + 1) % kBuffers]);
    const bool fresh = turn == 0;
    for (long tile = 0; tile < t.tiles; tile += 2) {
      const int count = (int)min_of(2, t.tiles - tile);
      float *own = s.sum + tile * t.padded * L, *to[2] = {fresh ? own : s.more, nullptr};
      to[1] = to[0] + t.padded * L;
      LaneState state[2];
      const auto attend = count == 2 ? attend_tiles<L, L == 16, K> : attend_tiles<L, false, K>;
      attend(a, task, t, tile, s, keys, later, to, state);
      for (int n = 0; n < count; n++) {
        if (fresh)
          s.state[tile + n] = state[n];
        else
          merge_lanes<L>(own + n * t.padded * L, s.state[tile + n], to[n], state[n], t.padded);
      }
    }
  }
  LS_TILE_RELEASE();
  for (long tile = 0; tile < t.tiles; tile++) {
    float* sum = s.sum + tile * t.padded * L;
    if (task.partial < 0) {
      write_tile<L>(a, task, t, tile, sum, s.state[tile]);
      continue;
    }
    float* to = a.partials + (task.partial + tile * 16) * a.partial_width();
    memcpy(to, sum, (size_t)(t.padded * L) * sizeof(float));
    memcpy(to + t.padded * L, &s.state[tile], sizeof(LaneState));
  }
}

template <int L, class K>
void merge_parts(const Attention<bf16, K>& a, const AttentionTask& task, const TaskShape& t) {
  float* sum = (float*)liushui::scratch(liushui::kWork, (size_t)(t.padded * L) * sizeof(float));
  for (long tile = 0; tile < t.tiles; tile++) {
    LaneState state, next;
    for (long split = 0; split < task.split_end - task.split_begin; split++) {
      const float* part =
          a.partials + (task.partial + (split * round_up(t.count, 16) + tile * 16)) * a.partial_width();
      memcpy(&next, part + t.padded * L, sizeof next);
      if (split > 0) {
        merge_lanes<L>(sum, state, part, next, t.padded);
        continue;
      }
      memcpy(sum, part, (size_t)(t.padded * L) * sizeof(float));
      state = next;
    }
    write_tile<L>(a, task, t, tile, sum, state);
  }
}

// Few rows share their vectors with other keys, not with rows that are not there.
template <class K>
void attend_task_tiled(Attention<bf16, K>& a, long index, bool merge) {
  const AttentionTask& task = (merge ? a.plan.merges : a.plan.tasks)[index];
  const long count = (long)task.count * a.group(), lanes = count <= 4 ? 4 : count <= 8 ? 8 : 16;
  const long padded = round_up(a.head_dim, lanes == 16 ? 16 : 32);
  const TaskShape t = {count, a.head_dim, padded, dim_chunks(a.head_dim), padded / 16, (count + lanes - 1) / lanes};
  const AttentionTask* next = index + a.threads < a.plan.num_tasks ? &a.plan.tasks[index + a.threads] : nullptr;
  if (merge)
    (lanes == 4 ? merge_parts<4, K> : lanes == 8 ? merge_parts<8, K> : merge_parts<16, K>)(a, task, t);
  else
    (lanes == 4 ? attend_lanes<4, K> : lanes == 8 ? attend_lanes<8, K> : attend_lanes<16, K>)(a, task, t, next);
}

}  // namespace
#endif
