// What the caller of a step hands over: plain structures that Python fills (kernels/native_step.py mirrors them).
#pragma once
#include "linear.h"

namespace liushui {

// One decoder layer. Norms and head norms are in the arithmetic type.
struct StepLayer {
  const PackedWeight *qkv, *output, *gate_up, *down;
  const void *attention_norm, *mlp_norm;  // [hidden]
  const void *q_norm, *k_norm;            // [head_dim] or null
  const float* rope;                      // [max_position, rotary]: cosines, then sines
  void *k_cache, *v_cache;                // [num_blocks, kv_heads, block_size, head_dim]
  float *k_scales, *v_scales;             // [num_blocks, kv_heads, block_size] of an int8 cache, else null
  int64_t max_position;
  int32_t rotary, window;  // window 0: none
  float scale, attention_eps, mlp_eps, head_eps;
};

struct StepModel {
  const StepLayer* layers;
  const void* norm;
  const PackedWeight* head;  // null: no tokens are chosen here
  int64_t hidden, inner, num_blocks;
  int32_t type, num_layers, num_heads, num_kv_heads, head_dim, block_size;
  float norm_eps;
  float residual_scale;  // of what a sub-layer adds, rounded before it is added; 1: none
  float logits_divisor;  // of logits, rounded again; 1: none
};

// Where a step's time goes (kernels/native_step.py has their names, in this order).
enum StepPart : int32_t {
  kPartNorm = 0,  // with the preparing of rows for a product
  kPartQkv = 1,
  kPartCache = 2,  // head norms, rotation, writing of keys and values
  kPartAttention = 3,
  kPartMerge = 4,  // of attention's splits
  kPartOutput = 5,
  kPartGateUp = 6,
  kPartActivation = 7,  // likewise
  kPartDown = 8,
  kPartHead = 9,  // with the choice of tokens
  kParts = 10,
};

struct StepBatch {
  void* x;  // [rows, hidden]: the embedded tokens; the residual stream, in place
  const int32_t *positions, *slots;
  const int32_t *query_start, *seq_lens, *block_table;
  const int32_t* wanted;  // [num_wanted] rows whose hidden state is asked for
  void* hidden;           // [num_wanted, hidden], after the last norm
  int32_t* tokens;        // [num_tokens] the most likely token of the first num_tokens wanted rows, -1: not finite
  void* memory;           // step_bytes() of work space, 64-byte aligned
  int64_t rows, num_wanted, num_tokens;
  int32_t num_sequences, max_blocks;
  int64_t* times;  // [threads, kParts, 2] or null: nanoseconds that each worker worked, then waited; added to
};

}  // namespace liushui
