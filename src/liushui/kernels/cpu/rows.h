// Normalisations, activations and the writing of the KV cache: every output is formed from one row, in an order
// that depends on the row's length alone.
#pragma once
#include "library.h"
#include "simd.h"

namespace {

// Rows are dealt out in groups of about this many elements; less than twice this is not worth a second thread.
constexpr long kGrain = 8192;

LS_INLINE int useful_threads(int threads, long elements) { return elements < 2 * kGrain ? 1 : threads; }

template <class T>
struct Norm {
  const T *x, *weight, *bias;
  T *residual, *out;
  long rows, width, rows_per_task;
  float eps, offset;
};

// residual += x (if there is one); returns the row to be normed.
template <class T>
LS_INLINE const T* add_residual(const Norm<T>& a, long row) {
  const T* x = a.x + row * a.width;
  if (!a.residual) return x;
  T* sum = a.residual + row * a.width;
  each_vector(0, a.width, [&](long i, long n) {
    store_up_to(sum + i, load_up_to(sum + i, n) + load_up_to(x + i, n), n);
  });
  return sum;
}

// Sum of (x - mean)^2, or of x alone with `squares` false.
template <class T>
LS_INLINE float row_sum(const T* x, long width, bool squares, float mean) {
  vf sum[4] = {};
  long i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const vf v = load(x + i + j * W) - mean;
      sum[j] = squares ? fma(v, v, sum[j]) : sum[j] + v;
    }
  for (; i < width; i += W) {
    const long n = width - i;
    vf v = load_up_to(x + i, n) - mean;
    if (n < W) {  // the lanes past the end must stay zero
      float lanes[W] = {};
      store_n(lanes, v, n);
      v = load(lanes);
    }
    sum[0] = squares ? fma(v, v, sum[0]) : sum[0] + v;
  }
  return lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void rms_norm_task(void* context, long task) {
  const Norm<T>& a = *(const Norm<T>*)context;
  for (long row = task * a.rows_per_task; row < min_of(a.rows, (task + 1) * a.rows_per_task); row++) {
    const T* x = add_residual(a, row);
    T* out = a.out + row * a.width;
    const float inverse = 1.0f / __builtin_sqrtf(row_sum(x, a.width, true, 0.0f) / (float)a.width + a.eps);
    each_vector(0, a.width, [&](long i, long n) {
      const vf v = (load_up_to(x + i, n) * inverse) * (load_up_to(a.weight + i, n) + a.offset);
      store_up_to(out + i, v, n);
    });
  }
}

template <class T>
void layer_norm_task(void* context, long task) {
  const Norm<T>& a = *(const Norm<T>*)context;
  for (long row = task * a.rows_per_task; row < min_of(a.rows, (task + 1) * a.rows_per_task); row++) {
    const T* x = add_residual(a, row);
    T* out = a.out + row * a.width;
    const float mean = row_sum(x, a.width, false, 0.0f) / (float)a.width;
    const float inverse = 1.0f / __builtin_sqrtf(row_sum(x, a.width, true, mean) / (float)a.width + a.eps);
    each_vector(0, a.width, [&](long i, long n) {
      const vf normed = (load_up_to(x + i, n) - mean) * inverse;
      store_up_to(out + i, fma(normed, load_up_to(a.weight + i, n), load_up_to(a.bias + i, n)), n);
    });
  }
}

template <class T>
void run_norm(int threads, Norm<T> a, void (*task)(void*, long)) {
  a.rows_per_task = max_of(1, kGrain / max_of(1, a.width));
  const long tasks = (a.rows + a.rows_per_task - 1) / a.rows_per_task;
  liushui::parallel(useful_threads(threads, a.rows * a.width), tasks, task, &a);
}

enum Activation { kSiluMul = 0, kGeluTanhMul = 1, kGeluTanh = 2 };

template <class T>
struct Activate {
  const T* x;
  T* out;
  long rows, width, pieces;  // a row is cut into this many pieces of kGrain
};

// x / (1 + e^-2u) is x (1 + tanh u) / 2 without its cancellation.
LS_INLINE vf gelu_tanh(vf x) {
  const vf u = fma(x * x, x * 0.044715f, x) * 0.7978845608f;
  return times_sigmoid(x, u + u);
}

// x times its logistic function; as finely as T can tell.
template <class T>
LS_INLINE vf silu(vf x) {
#if defined(__AMX_TILE__)
  if constexpr (sizeof(T) == 2) {
    const __m512 most = _mm512_set1_ps(126.0f);  // the second where one is not a number
    const vf below = power_of_two((vf)_mm512_min_ps(most, (__m512)(x * -1.44269504f))) + 1.0f;
    const vf near = (vf)_mm512_rcp14_ps((__m512)below);
    return x * fma(near, fma(-below, near, splat(1.0f)), near);
  }
#endif
  return times_sigmoid(x, x);
}

template <class T, int kind>
void activate_task(void* context, long task) {
  const Activate<T>& a = *(const Activate<T>*)context;
  const long row = task / a.pieces, from = task % a.pieces * kGrain, to = min_of(a.width, from + kGrain);
  const T* x = a.x + row * a.width * (kind == kGeluTanh ? 1 : 2);
  T* out = a.out + row * a.width;
  each_vector(from, to, [&](long i, long n) {
    const vf gate = load_up_to(x + i, n);
    vf y = kind == kSiluMul ? silu<T>(gate) : gelu_tanh(gate);
    if (kind != kGeluTanh) y = y * load_up_to(x + a.width + i, n);
    store_up_to(out + i, y, n);
  });
}

template <class T>
void run_activation(int threads, int kind, Activate<T> a) {
  a.pieces = max_of(1, (a.width + kGrain - 1) / kGrain);
  const auto task = kind == kSiluMul       ? activate_task<T, kSiluMul>
                    : kind == kGeluTanhMul ? activate_task<T, kGeluTanhMul>
                                           : activate_task<T, kGeluTanh>;
  liushui::parallel(useful_threads(threads, a.rows * a.width), a.rows * a.pieces, task, &a);
}

// T: arithmetic; K: what the cache holds, T itself or int8 with a scale for each token and head.
template <class T, class K>
struct ToCache {
  T* qkv;
  K *k_cache, *v_cache;
  float *k_scales, *v_scales;  // [num_blocks, num_kv_heads, block_size], for int8
  const int32_t *positions, *slots;
  const float* rope;
  const T *q_norm, *k_norm;
  long tokens, tokens_per_task;
  int num_heads, num_kv_heads, head_dim, rotary, block_size;
  long max_position, num_slots;
  float eps;
  int bad;
};

// One head: RMS norm (if there is a weight), then rotation of (x[i], x[i + rotary/2]) by the position's angle i.
template <class T, class K>
LS_INLINE void norm_and_rotate(const ToCache<T, K>& a, const T* x, T* out, const T* weight, const float* angles) {
  const long dim = a.head_dim, half = a.rotary / 2;
  const float inverse =
      weight ? 1.0f / __builtin_sqrtf(row_sum(x, dim, true, 0.0f) / (float)dim + a.eps) : 1.0f;
  const auto value = [&](long i, long n) {
    const vf v = load_up_to(x + i, n);
    return weight ? (v * inverse) * load_up_to(weight + i, n) : v;
  };
  each_vector(0, half, [&](long i, long n) {
    const vf first = value(i, n), second = value(half + i, n);
    const vf cosine = load_up_to(angles + i, n), sine = load_up_to(angles + half + i, n);
    store_up_to(out + i, fma(first, cosine, -(second * sine)), n);
    store_up_to(out + half + i, fma(second, cosine, first * sine), n);
  });
  each_vector(2 * half, dim, [&](long i, long n) { store_up_to(out + i, value(i, n), n); });
}

// x in whole numbers of -127 .. 127 times the scale returned; one that is not finite makes the scale NaN.
template <class T>
LS_INLINE float to_int8(const T* x, long dim, int8_t* out) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf most = {};
  vi odd = {};
  for (long i = 0; i < dim; i += W) {
    const vf v = load_up_to(x + i, dim - i);
    most = vmax(most, vmax(v, -v));
    odd |= (vi)(v - v != splat(0.0f));
  }
  const float largest = lane_max(most);
  float lanes[W];
  store(lanes, select(odd, splat(1.0f), splat(0.0f)));
  for (int i = 0; i < W; i++)
    if (lanes[i] != 0.0f) {
      memset(out, 1, (size_t)dim);
      return __builtin_nanf("");
    }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (long i = 0; i < dim; i += W) {
    const vi whole = (vi)(load_up_to(x + i, dim - i) * inverse + magic) - (vi)magic;
    for (long j = 0; j < min_of(W, dim - i); j++) out[i + j] = (int8_t)max_of(-127, min_of(127, whole[j]));
  }
  return largest / 127.0f;
}

// Brings a later token near: its row, part of which another worker made, and its place in the cache, long unused.
template <class T, class K>
LS_INLINE void fetch_token(const ToCache<T, K>& a, long t) {
  const long dim = a.head_dim, width = (a.num_heads + 2L * a.num_kv_heads) * dim;
  const char* row = (const char*)(a.qkv + t * width);
  for (long i = 0; i < width * (long)sizeof(T); i += 64) __builtin_prefetch(row + i, 0, 3);
  const long slot = a.slots[t];
  if (slot < 0 || slot >= a.num_slots) return;
  for (long h = 0; h < a.num_kv_heads; h++) {
    const long place = ((slot / a.block_size * a.num_kv_heads + h) * a.block_size + slot % a.block_size) * dim;
    for (long i = 0; i < dim; i += 64 / (long)sizeof(K)) {
      __builtin_prefetch(a.k_cache + place + i, 1, 3);
      __builtin_prefetch(a.v_cache + place + i, 1, 3);
    }
  }
}

template <class T, class K>
void to_cache_task(void* context, long task) {
  ToCache<T, K>& a = *(ToCache<T, K>*)context;
  const long dim = a.head_dim, heads = a.num_heads + 2L * a.num_kv_heads;
  for (long t = task * a.tokens_per_task; t < min_of(a.tokens, (task + 1) * a.tokens_per_task); t++) {
    const long slot = a.slots[t], position = a.positions[t];
    if (t + 2 < a.tokens) fetch_token(a, t + 2);
    if (slot < 0) continue;
    if (slot >= a.num_slots || (a.rope && (position < 0 || position >= a.max_position))) {
      __atomic_store_n(&a.bad, 1, __ATOMIC_RELAXED);
      continue;
    }
    T* row = a.qkv + t * heads * dim;
    const float* angles = a.rope ? a.rope + position * a.rotary : nullptr;
    if (a.q_norm || a.rotary > 0)
      for (long h = 0; h < a.num_heads; h++)
        norm_and_rotate(a, row + h * dim, row + h * dim, a.q_norm, angles);
    const long block = slot / a.block_size, offset = slot % a.block_size;
    for (long h = 0; h < a.num_kv_heads; h++) {
      const long token = (block * a.num_kv_heads + h) * a.block_size + offset, place = token * dim;
      T* k = row + (a.num_heads + h) * dim;
      const T* v = k + a.num_kv_heads * dim;
      if constexpr (sizeof(K) == 1) {
        norm_and_rotate(a, k, k, a.k_norm, angles);
        a.k_scales[token] = to_int8(k, dim, a.k_cache + place);
        a.v_scales[token] = to_int8(v, dim, a.v_cache + place);
      } else {
        norm_and_rotate(a, k, a.k_cache + place, a.k_norm, angles);
        memcpy((void*)(a.v_cache + place), v, (size_t)dim * sizeof(T));
      }
    }
  }
}

template <class T, class K>
int run_to_cache(int threads, ToCache<T, K> a) {
  const long width = (a.num_heads + 2L * a.num_kv_heads) * a.head_dim;
  a.bad = 0;
  a.tokens_per_task = max_of(1, kGrain / max_of(1, width));
  const long tasks = (a.tokens + a.tokens_per_task - 1) / a.tokens_per_task;
  liushui::parallel(useful_threads(threads, a.tokens * width), tasks, to_cache_task<T, K>, &a);
  return a.bad;
}

}  // namespace
