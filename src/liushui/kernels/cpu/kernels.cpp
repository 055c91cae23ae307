// The kernels under their C names, compiled once per instruction set: liushui_<op>_<LS_ISA>. `type` is 0 for
// float32 and 1 for bfloat16; a non-zero result means an index out of range.
#include "attention.h"
#include "rows.h"

#define LS_JOIN2(a, b) liushui_##a##_##b
#define LS_JOIN(a, b) LS_JOIN2(a, b)
#define LS_EXPORT(result, name) extern "C" __attribute__((visibility("default"))) result LS_JOIN(name, LS_ISA)

namespace {

template <class T>
int norm(int threads, const void* x, const void* weight, const void* bias, void* residual, void* out, long rows,
         long width, float eps, float offset, bool layer) {
  const Norm<T> a = {(const T*)x, (const T*)weight, (const T*)bias, (T*)residual, (T*)out, rows, width, 1, eps, offset};
  run_norm(threads, a, layer ? layer_norm_task<T> : rms_norm_task<T>);
  return 0;
}

template <class T>
int activation(int threads, int kind, const void* x, void* out, long rows, long width) {
  run_activation(threads, kind, Activate<T>{(const T*)x, (T*)out, rows, width, 1});
  return 0;
}

template <class T, class K>
int to_cache(int threads, void* qkv, int num_heads, int num_kv_heads, int head_dim, const int32_t* positions,
             const int32_t* slots, long tokens, void* k_cache, void* v_cache, float* k_scales, float* v_scales,
             long num_blocks, int block_size, const float* rope, long max_position, int rotary, const void* q_norm,
             const void* k_norm, float eps) {
  return run_to_cache(threads, ToCache<T, K>{(T*)qkv, (K*)k_cache, (K*)v_cache, k_scales, v_scales, positions, slots,
                                             rope, (const T*)q_norm, (const T*)k_norm, tokens, 1, num_heads,
                                             num_kv_heads, head_dim, rope ? rotary : 0, block_size, max_position,
                                             num_blocks * block_size, eps, 0});
}

template <class T, class K>
int attention(int threads, const void* qkv, long qkv_stride, void* out, long rows, int num_heads, int num_kv_heads,
              int head_dim, const void* k_cache, const void* v_cache, const float* k_scales, const float* v_scales,
              long num_blocks, int block_size, const int32_t* query_start, const int32_t* seq_lens,
              const int32_t* block_table, int num_sequences, int max_blocks, float scale, int window) {
  Attention<T, K> a = {(const T*)qkv, (const K*)k_cache, (const K*)v_cache, k_scales, v_scales, (T*)out, query_start,
                       seq_lens, block_table, num_sequences, num_heads, num_kv_heads, head_dim, block_size, max_blocks,
                       rows, num_blocks, qkv_stride, scale, window, threads, {}, nullptr, 0};
  return run_attention(a);
}

// The instance for the arithmetic type and for what the cache holds: int8 where there are scales.
#define LS_PICK(f) (type ? (k_scales ? f<bf16, int8_t> : f<bf16, bf16>) : (k_scales ? f<float, int8_t> : f<float, float>))

}  // namespace

LS_EXPORT(int, norm)(int type, int threads, const void* x, const void* weight, const void* bias, void* residual,
                     void* out, long rows, long width, float eps, float offset, int layer) {
  return (type ? norm<bf16> : norm<float>)(threads, x, weight, bias, residual, out, rows, width, eps, offset, layer);
}

LS_EXPORT(int, activation)(int type, int threads, int kind, const void* x, void* out, long rows, long width) {
  return (type ? activation<bf16> : activation<float>)(threads, kind, x, out, rows, width);
}

LS_EXPORT(int, to_cache)(int type, int threads, void* qkv, int num_heads, int num_kv_heads, int head_dim,
                         const int32_t* positions, const int32_t* slots, long tokens, void* k_cache, void* v_cache,
                         float* k_scales, float* v_scales, long num_blocks, int block_size, const float* rope,
                         long max_position, int rotary, const void* q_norm, const void* k_norm, float eps) {
  return LS_PICK(to_cache)(threads, qkv, num_heads, num_kv_heads, head_dim, positions, slots, tokens, k_cache, v_cache,
                           k_scales, v_scales, num_blocks, block_size, rope, max_position, rotary, q_norm, k_norm, eps);
}

LS_EXPORT(int, attention)(int type, int threads, const void* qkv, long qkv_stride, void* out, long rows, int num_heads,
                          int num_kv_heads, int head_dim, const void* k_cache, const void* v_cache,
                          const float* k_scales, const float* v_scales, long num_blocks, int block_size,
                          const int32_t* query_start, const int32_t* seq_lens, const int32_t* block_table,
                          int num_sequences, int max_blocks, float scale, int window) {
  return LS_PICK(attention)(threads, qkv, qkv_stride, out, rows, num_heads, num_kv_heads, head_dim, k_cache, v_cache,
                            k_scales, v_scales, num_blocks, block_size, query_start, seq_lens, block_table,
                            num_sequences, max_blocks, scale, window);
}
