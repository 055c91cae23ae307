// Attention's arithmetic on one block of keys: scores, online softmax, weighted values.
//
// Every number is formed by one chain of operations, whatever else is in the tile.
#pragma once
#include "simd.h"

namespace {

constexpr int kKeys = 32;     // keys in a block, aligned to absolute positions: few enough for the nearest cache
constexpr int kTileSplit = 256;  // keys of a split with matrix tiles: the scores of 32 rows fit the nearest cache
constexpr int kTileRows = 6;  // query rows whose sums fit the registers
static_assert(kKeys % W == 0, "a block is whole vectors");

// What `tile` multiplies with: row k, from column c on.
struct Matrix {
  const float* first;
  long stride;
  template <int N>
  LS_INLINE const float* row(long k, long c) const {
    return first + k * stride + c;
  }
};

struct Scattered {
  const float* const* rows;
  template <int N>
  LS_INLINE const float* row(long k, long c) const {
    return rows[k] + c;
  }
};

// While row k of the values is used, row k of the next block's keys is fetched: memory is never idle.
template <class T>
struct Fetching {
  const T *const *rows, *const *ahead;
  template <int N>
  LS_INLINE const T* row(long k, long c) const {
    const char* next = (const char*)(ahead[k] + c);
    for (long i = 0; i < (long)(N * W * sizeof(T)); i += 64) __builtin_prefetch(next + i);
    return rows[k] + c;
  }
};

// out[r][0 .. N vectors) = out * keep[r] + sum over k in [from, to) of a[r][k] * b's row k, in the order of k.
template <int M, int N, class B>
LS_INLINE void tile(const float* a, long lda, B b, long column, long from, long to, float* out, long ldo,
                    const float* keep) {
  out += column;
  vf sum[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) sum[r][c] = keep ? load(out + r * ldo + c * W) * keep[r] : vf{};
  for (long k = from; k < to; k++) {
    const auto* row = b.template row<N>(k, column);
    if constexpr (M < N) {  // the fewer operands stay in registers beside the sums
      vf left[M];
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) left[r] = splat(a[r * lda + k]);
#pragma GCC unroll 8
      for (int c = 0; c < N; c++) {
        const vf right = load(row + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) sum[r][c] = fma(left[r], right, sum[r][c]);
      }
    } else {
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
  for (; c + kMost <= vectors; c += kMost) tile<M, kMost>(a, lda, b, c * W, from, to, out, ldo, keep);
  if constexpr (kMost > 4)
    for (; c + 4 <= vectors; c += 4) tile<M, 4>(a, lda, b, c * W, from, to, out, ldo, keep);
  if constexpr (kMost > 2)
    for (; c + 2 <= vectors; c += 2) tile<M, 2>(a, lda, b, c * W, from, to, out, ldo, keep);
  for (; c < vectors; c++) tile<M, 1>(a, lda, b, c * W, from, to, out, ldo, keep);
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

// The column of one dimension, where fewer than four are left.
template <class T>
LS_INLINE vk load_column(const T* const* rows, long d) {
  float lanes[Kw];
  for (int i = 0; i < Kw; i++) lanes[i] = widen(rows[i][d]);
  return load_k(lanes);
}

// Fetches `count` rows of `dim` elements that will be needed soon, to a near cache (3: the nearest).
template <int kNear = 3, class T>
LS_INLINE void fetch_rows(const T* const* rows, long count, long dim) {
  for (long j = 0; j < count; j++)
    for (long i = 0; i < dim * (long)sizeof(T); i += 64) __builtin_prefetch((const char*)rows[j] + i, 0, kNear);
}

// Transposed keys: out[d][j] for keys j in [from, to), which are multiples of Kw. Their values are fetched meanwhile,
// evenly, since more requests at once than the core can hold would stall it.
template <class T>
void transpose_keys(const T* const* keys, const T* const* values, long from, long to, long dim, float* out) {
  constexpr long kParts = 16 / Kw;  // of a row of values: each step over 4 dimensions fetches one
  const long part = dim * (long)sizeof(T) / kParts;
  for (long j = from; j < to; j += Kw) {
    long d = 0;
    for (; d + 4 <= dim; d += 4) {
      const long step = d / 4;
      if (step < kParts * Kw) {
        const char* value = (const char*)values[j + step / kParts] + step % kParts * part;
        for (long i = 0; i < part; i += 64) __builtin_prefetch(value + i);
      }
      vk columns[4];
      load_columns(keys + j, d, columns);
      for (int i = 0; i < 4; i++) store_k(out + (d + i) * kKeys + j, columns[i]);
    }
    for (; d < dim; d++) store_k(out + d * kKeys + j, load_column(keys + j, d));
  }
}

// Which keys of the block each row of a tile sees: [from, to), empty as [0, 0).
struct Sight {
  long from[kTileRows], to[kTileRows];
  long all_from, all_to, last;  // what all rows see (if not empty), and the end of what any sees
};

// Online softmax (Milakov and Gimelshein, 2018) of the rows over the keys they see: scores become weights, `largest`
// and `weight` (sum of weights) are brought forward, and `keep` is what earlier sums must be multiplied by.
LS_INLINE void soften(int rows, const Sight& sight, float* scores, float* largest, float* weight, float* keep) {
  const float lowest = -__builtin_inff();
  const long vectors = (sight.last + W - 1) / W;
  float drop[(kTileRows + W - 1) / W * W] = {};
  for (int r = 0; r < rows; r++) {
    float* row = scores + r * kKeys;
    for (long j = 0; j < sight.from[r]; j++) row[j] = lowest;
    for (long j = sight.to[r]; j < vectors * W; j++) row[j] = lowest;
    vf most = load(row);
    for (long v = 1; v < vectors; v++) most = vmax(most, load(row + v * W));
    const float now = lane_max(most), before = largest[r];
    largest[r] = now > before ? now : before;
    drop[r] = weight[r] == 0.0f ? lowest : before - largest[r];
  }
  for (long r = 0; r < rows; r += W) store(drop + r, vexp_of_negative(load(drop + r)));
  for (int r = 0; r < rows; r++) {
    if (sight.to[r] == 0) {  // sees nothing here
      keep[r] = 1.0f;
      continue;
    }
    float* row = scores + r * kKeys;
    const vf highest = splat(largest[r]);
    vf total = {};
    for (long v = 0; v < vectors; v++) {
      const vf p = vexp_of_negative(load(row + v * W) - highest);
      store(row + v * W, p);
      total = total + p;
    }
    keep[r] = drop[r];
    weight[r] = weight[r] * keep[r] + lane_sum(total);
  }
}

// sum[r] = sum[r] * keep[r] + the weighted values that row r sees.
template <class B>
LS_INLINE void add_values(int rows, const Sight& sight, const float* weights, B values, float* sum, long padded,
                          const float* keep) {
  const float ones[kTileRows] = {1, 1, 1, 1, 1, 1};
  const bool shared = sight.all_from < sight.all_to;
  float scale[kTileRows];
  for (int r = 0; r < rows; r++) {  // what a row sees before the others do, it adds alone
    const long end = shared ? sight.all_from : sight.to[r];
    scale[r] = keep[r];
    if (sight.from[r] >= end) continue;
    tile_rows(1, weights + r * kKeys, 0, values, sight.from[r], end, sum + r * padded, 0, padded / W, scale + r);
    scale[r] = 1.0f;
  }
  if (!shared) return;
  tile_rows(rows, weights, kKeys, values, sight.all_from, sight.all_to, sum, padded, padded / W, scale);
  for (int r = 0; r < rows; r++)  // and so after
    if (sight.all_to < sight.to[r])
      tile_rows(1, weights + r * kKeys, 0, values, sight.all_to, sight.to[r], sum + r * padded, 0, padded / W, ones);
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
  const float keep = vexp_of_negative(splat(largest - joint))[0], add = vexp_of_negative(splat(more_largest - joint))[0];
  for (long d = 0; d < padded; d += W) store(sum + d, fma(load(more + d), splat(add), load(sum + d) * keep));
  weight = weight * keep + more_weight * add;
  largest = joint;
}

}  // namespace
