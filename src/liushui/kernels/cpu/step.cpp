// One step of a decoder put together from plain parts, all layers in one parallel region. Compiled once per
// instruction set.
//
// The parts are those of the operations called one by one, so the bits are theirs as well: rows are dealt out to the
// workers for what is done row by row, columns for products, (sequence, head) pairs for attention, and barriers stand
// between. A lone row is normed and prepared by every worker for itself, which costs less than a barrier. Many rows
// pass through the products in blocks, so that what lies between two products stays in the nearer caches.
#include "step.h"

#include <stdlib.h>
#include <time.h>

#include "attention.h"
#include "rows.h"

#define LS_JOIN2(a, b) liushui_##a##_##b
#define LS_JOIN(a, b) LS_JOIN2(a, b)
#define LS_EXPORT(result, name) extern "C" __attribute__((visibility("default"))) result LS_JOIN(name, LS_ISA)

namespace {

using liushui::Output;
using liushui::PackedWeight;
using liushui::StepBatch;
using liushui::StepLayer;
using liushui::StepModel;

#if defined(LS_BF16)
constexpr long kStepRows = 512;  // rows of a block: each reads the weights from memory
#else
constexpr long kStepRows = 256;
#endif
constexpr long kFewRows = 16;    // up to here a product is the reading of its weight: long pieces
constexpr int kShares = 8;       // of a worker in a product of more rows

// The best logit of a row so far.
struct Best {
  float value;
  int32_t token, spoiled;
};

// Work space, cut up once per step.
struct Space {
  char *normed, *prepared, *qkv, *mixed, *gate_up, *inner, *update;
  char* own;  // per worker: a row and its prepared form
  size_t own_row, own_bytes;
  Best* best;  // [workers, num_tokens]
  size_t total;
};

size_t aligned(size_t bytes) { return (bytes + 63) & ~size_t{63}; }

size_t most_prepared(const StepModel& m, long rows) {
  size_t most = 0;
  const auto see = [&](const PackedWeight* weight) {
    for (; weight; weight = weight->next) {
      const size_t bytes = liushui::LS_ISA::prepared_bytes(*weight, m.type, rows);
      if (bytes > most) most = bytes;
    }
  };
  for (long i = 0; i < m.num_layers; i++) {
    const StepLayer& layer = m.layers[i];
    see(layer.qkv), see(layer.output), see(layer.gate_up), see(layer.down);
  }
  see(m.head);
  return most;
}

Space divide(const StepModel& m, long rows, long num_tokens, int threads, char* memory) {
  const size_t size = m.type ? 2 : 4;
  const long block = min_of(rows, kStepRows), prepared_rows = max_of(block, num_tokens);
  const long heads = m.num_heads + 2L * m.num_kv_heads, dim = m.head_dim, mixed = m.num_heads * dim;
  const long widest = max_of(max_of(m.hidden, m.inner), mixed);
  Space s;
  char* at = memory;
  const auto take = [&](size_t bytes) {
    char* begin = at;
    at += aligned(bytes);
    return begin;
  };
  const auto activations = [&](long count, long width) { return take((size_t)(count * width) * size); };
  const auto larger = [](size_t a, size_t b) { return a > b ? a : b; };
  s.normed = activations(block, m.hidden);
  s.prepared = take(most_prepared(m, prepared_rows));
  s.qkv = activations(rows, heads * dim);
  s.mixed = activations(rows, mixed);
  s.gate_up = activations(block, 2 * m.inner);
  s.inner = take(larger((size_t)(block * m.inner) * size, most_prepared(m, block)));
  s.update = activations(block, m.hidden);
  s.own_row = aligned((size_t)widest * size);
  s.own_bytes = s.own_row + aligned(most_prepared(m, 1));
  s.own = take(s.own_bytes * (size_t)threads);
  s.best = (Best*)take(sizeof(Best) * (size_t)(num_tokens * threads));
  s.total = (size_t)(at - memory);
  return s;
}

template <class T>
struct Step {
  const StepModel& m;
  const StepBatch& b;
  Space s;
  int threads;
  liushui::AttentionPlan* plans;  // of each layer
  float* partials;
  int32_t* taken;  // [layers, 2]: attention's tasks and merges that have been taken
  int32_t* shares;  // [products]: of each, how many shares have been taken
  int bad;
};

// One of the threads of a step, and its clock, for those who ask where the time goes.
struct Worker {
  int index, count;
  int64_t *times, last;  // null: nobody asks
  long products;         // that it has been through

  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
  }
  void lap(int part, int waited) {
    if (!times) return;
    const int64_t time = now();
    times[2 * part + waited] += time - last;
    last = time;
  }
  void did(liushui::StepPart part) { lap(part, 0); }
  // All workers have done `part`.
  void meet(liushui::StepPart part) {
    liushui::barrier(count);
    lap(part, 1);
  }
};

// Rows dealt out to the workers.
struct Deal {
  long begin, end;
};
LS_INLINE Deal deal(long rows, const Worker& w) { return {rows * w.index / w.count, rows * (w.index + 1) / w.count}; }

// Calls each(share, shares, taken) for what this worker takes of a product, so that one who is held up holds up nobody. Of
// many rows there are several shares a worker; of few one, and a word with which the product itself may do so.
template <class T, class Each>
void take_shares(Step<T>& step, long rows, Worker& w, const Each& each) {
  int32_t* taken = &step.shares[w.products++];
  if (rows <= kFewRows || w.count == 1) return each(w.index, w.count, taken);
  const int shares = kShares * w.count;
  for (int share; (share = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < shares;) each(share, shares, nullptr);
}

// What `weight` multiplies with: make(row, to) writes row `row` to `to`, or says where it lies. Leaves with a barrier,
// except for a lone row, which every worker makes for itself.
template <class T, class Make>
const void* product_input(Step<T>& step, const PackedWeight& weight, long rows, T* made, const Make& make,
                          liushui::StepPart part, Worker& w) {
  using namespace liushui::LS_ISA;
  const int type = step.m.type;
  const bool prepares = prepared_bytes(weight, type, rows) != 0;
  T* own = (T*)(step.s.own + (size_t)w.index * step.s.own_bytes);
  char* own_prepared = (char*)own + step.s.own_row;
  if (rows == 1) {
    const T* row = make(0, own);
    if (prepares) prepare_rows(weight, row, type, 0, 1, own_prepared);
    w.did(part);
    return prepares ? own_prepared : (const void*)row;
  }
  const long together = prepares ? rows_together(weight, rows) : 1;
  const Deal mine = deal((rows + together - 1) / together, w);
  for (long begin = mine.begin * together; begin < min_of(rows, mine.end * together); begin += together) {
    const long end = min_of(rows, begin + together);
    const T* values = make(begin, prepares && together == 1 ? own : made + begin * weight.k);
    for (long row = begin + 1; row < end; row++) make(row, made + row * weight.k);
    if (prepares) prepare_rows(weight, values, type, begin, end, step.s.prepared);
  }
  w.did(part);
  w.meet(part);
  return prepares ? step.s.prepared : (char*)made;
}

// y = x w^T for `rows` rows of what product_input made. Leaves without a barrier.
template <class T>
void product(Step<T>& step, const PackedWeight& weight, long rows, const void* x, const Output& out,
             liushui::StepPart part, Worker& w) {
  using namespace liushui::LS_ISA;
  if (out.epilogue == liushui::kHand)  // which knows its workers
    multiply(weight, x, step.m.type, rows, out, w.index, w.count);
  else
    take_shares(step, rows, w, [&](int share, int shares, int32_t* taken) {
      multiply(weight, x, step.m.type, rows, out, share, shares, taken);
    });
  w.did(part);
}

// The residual stream += y, in block [first, first + rows).
template <class T>
void product_to_stream(Step<T>& step, const PackedWeight& weight, long first, long rows, const void* made,
                       liushui::StepPart part, Worker& w) {
  const long width = step.m.hidden;
  T* stream = (T*)step.b.x + first * width;
  if (step.m.residual_scale == 1.0f) {
    product(step, weight, rows, made, Output{stream, step.m.type, liushui::kAdd, width, nullptr, nullptr}, part, w);
    return w.meet(part);
  }
  T* update = (T*)step.s.update;
  product(step, weight, rows, made, Output{update, step.m.type, liushui::kStore, width, nullptr, nullptr}, part, w);
  w.meet(part);
  const Deal mine = deal(rows * width, w);
  for (long i = mine.begin; i < mine.end; i += W) {
    const long n = mine.end - i;
    T scaled[W];
    store(scaled, load_up_to(update + i, n) * step.m.residual_scale);
    store_up_to(stream + i, load_up_to(stream + i, n) + load(scaled), n);
  }
  w.did(part);
  w.meet(part);
}

template <class T>
auto norm_of(const T* x, const void* weight, float eps, long width) {
  return [=](long row, T* to) {
    const char* later = (const char*)(x + (row + 2) * width);  // half of it was another worker's
    for (long i = 0; i < width * (long)sizeof(T); i += 64) __builtin_prefetch(later + i, 0, 3);
    const Norm<T> norm = {x + row * width, (const T*)weight, nullptr, nullptr, to, 1, width, 1, eps, 0.0f};
    rms_norm_task<T>((void*)&norm, 0);
    return to;
  };
}

// What `weight` multiplies with, for rows that are there already.
template <class T>
const void* product_input(Step<T>& step, const PackedWeight& weight, long rows, T* x, liushui::StepPart part,
                          Worker& w) {
  if (liushui::LS_ISA::prepared_bytes(weight, step.m.type, rows) == 0) return x;
  return product_input(step, weight, rows, x, [=](long row, T*) { return x + row * weight.k; }, part, w);
}

template <class T, class K>
void attend(Step<T>& step, long index, Worker& w) {
  const StepModel& m = step.m;
  const StepBatch& b = step.b;
  const StepLayer& layer = m.layers[index];
  T* qkv = (T*)step.s.qkv;
  ToCache<T, K> write = {qkv, (K*)layer.k_cache, (K*)layer.v_cache, layer.k_scales, layer.v_scales, b.positions, b.slots, layer.rope,
                      (const T*)layer.q_norm, (const T*)layer.k_norm, b.rows, 1, m.num_heads, m.num_kv_heads,
                      m.head_dim, layer.rotary, m.block_size, (long)layer.max_position, (long)m.num_blocks * m.block_size,
                      layer.head_eps, 0};
  const Deal mine = deal(b.rows, w);
  for (long row = mine.begin; row < mine.end; row++) to_cache_task<T, K>(&write, row);
  if (write.bad) __atomic_store_n(&step.bad, 1, __ATOMIC_RELAXED);
  w.did(liushui::kPartCache);
  w.meet(liushui::kPartCache);
  Attention<T, K> a = {qkv, (const K*)layer.k_cache, (const K*)layer.v_cache, layer.k_scales, layer.v_scales, (T*)step.s.mixed, b.query_start, b.seq_lens,
                    b.block_table, b.num_sequences, m.num_heads, m.num_kv_heads, m.head_dim, m.block_size,
                    b.max_blocks, (long)b.rows, (long)m.num_blocks, (m.num_heads + 2L * m.num_kv_heads) * m.head_dim,
                    layer.scale, layer.window, w.count, step.plans[index], step.partials, 0};
  int32_t* taken = step.taken + 2 * index;
  for (long task; (task = __atomic_fetch_add(&taken[0], 1, __ATOMIC_RELAXED)) < a.plan.num_tasks;)
    attend_task<T, K>(&a, task);
  w.did(liushui::kPartAttention);
  w.meet(liushui::kPartAttention);
  if (a.plan.num_merges) {
    for (long task; (task = __atomic_fetch_add(&taken[1], 1, __ATOMIC_RELAXED)) < a.plan.num_merges;)
      merge_task<T, K>(&a, task);
    w.did(liushui::kPartMerge);
    w.meet(liushui::kPartMerge);
  }
  if (a.bad) __atomic_store_n(&step.bad, 1, __ATOMIC_RELAXED);
}

// SiLU of the gate times what it lets through, [rows, inner], as `down` multiplies with it.
template <class T>
const void* gated_input(Step<T>& step, const StepLayer& layer, long rows, const void* x, Worker& w) {
  using namespace liushui::LS_ISA;
  const long inner = step.m.inner;
  if (can_gate(*layer.gate_up, *layer.down, step.m.type)) {
    take_shares(step, rows, w, [&](int share, int shares, int32_t* taken) {
      multiply_gated(*layer.gate_up, *layer.down, x, rows, step.s.inner, share, shares, taken);
    });
    w.did(liushui::kPartGateUp);
    w.meet(liushui::kPartGateUp);
    return step.s.inner;
  }
  const T* gate_up = (const T*)step.s.gate_up;
  product(step, *layer.gate_up, rows, x,
          Output{step.s.gate_up, step.m.type, liushui::kStore, 2 * inner, nullptr, nullptr}, liushui::kPartGateUp, w);
  w.meet(liushui::kPartGateUp);
  return product_input(step, *layer.down, rows, (T*)step.s.inner,
                       [=](long row, T* to) {
                         const long pieces = (inner + kGrain - 1) / kGrain;
                         const Activate<T> a = {gate_up + row * 2 * inner, to, 1, inner, pieces};
                         for (long piece = 0; piece < pieces; piece++) activate_task<T, kSiluMul>((void*)&a, piece);
                         return to;
                       },
                       liushui::kPartActivation, w);
}

template <class T>
void layer_forward(Step<T>& step, long index, Worker& w) {
  const StepModel& m = step.m;
  const StepLayer& layer = m.layers[index];
  const long hidden = m.hidden, mixed = (long)m.num_heads * m.head_dim;
  const long qkv = (m.num_heads + 2L * m.num_kv_heads) * m.head_dim;
  const T* x = (const T*)step.b.x;
  T* normed = (T*)step.s.normed;
  for (long first = 0; first < step.b.rows; first += kStepRows) {
    const long rows = min_of(kStepRows, step.b.rows - first);
    const auto norm = norm_of(x + first * hidden, layer.attention_norm, layer.attention_eps, hidden);
    const void* made = product_input(step, *layer.qkv, rows, normed, norm, liushui::kPartNorm, w);
    product(step, *layer.qkv, rows, made,
            Output{(T*)step.s.qkv + first * qkv, m.type, liushui::kStore, qkv, nullptr, nullptr}, liushui::kPartQkv, w);
    w.meet(liushui::kPartQkv);
  }
  if (layer.k_scales)
    attend<T, int8_t>(step, index, w);
  else
    attend<T, T>(step, index, w);
  for (long first = 0; first < step.b.rows; first += kStepRows) {
    const long rows = min_of(kStepRows, step.b.rows - first);
    const void* made = product_input(step, *layer.output, rows, (T*)step.s.mixed + first * mixed,
                                     liushui::kPartOutput, w);
    product_to_stream(step, *layer.output, first, rows, made, liushui::kPartOutput, w);
    const auto norm = norm_of(x + first * hidden, layer.mlp_norm, layer.mlp_eps, hidden);
    made = product_input(step, *layer.gate_up, rows, normed, norm, liushui::kPartNorm, w);
    made = gated_input(step, layer, rows, made, w);
    product_to_stream(step, *layer.down, first, rows, made, liushui::kPartDown, w);
  }
}

// The larger logit wins, the smaller index among equals, as argmax has it; one that is not a number spoils the row.
template <class T>
void keep_best(void* context, int worker, long row, long column, const float* values, long count) {
  Step<T>& step = *(Step<T>*)context;
  Best& best = step.s.best[(long)worker * step.b.num_tokens + row];
  float scaled[64];
  for (long from = 0; from < count; from += 64) {
    const long part = min_of(64, count - from);
    const float* v = values + from;
    if (step.m.logits_divisor != 1.0f) {
      for (long i = 0; i < part; i += W) {
        T once[W];
        store(once, load_up_to(v + i, part - i) / step.m.logits_divisor);
        store_up_to(scaled + i, load(once), part - i);
      }
      v = scaled;
    }
    vi worth = {};  // a look: a larger one, or one that is not a number
    for (long i = 0; i + W <= part; i += W) {
      const vf x = load(v + i);
      worth |= (vi)(x > splat(best.value)) | (vi)(x != x);
    }
    const bool look = part % W != 0 || any(worth);
    if (!look) continue;
    for (long i = 0; i < part; i++) {
      best.spoiled |= v[i] != v[i];
      const int32_t token = (int32_t)(column + from + i);
      if (v[i] > best.value || (v[i] == best.value && token < best.token)) {
        best.value = v[i];
        best.token = token;
      }
    }
  }
}

template <class T>
void choose_tokens(Step<T>& step, Worker& w) {
  const StepBatch& b = step.b;
  const long count = b.num_tokens;
  for (long row = 0; row < count; row++)
    step.s.best[w.index * count + row] = Best{-__builtin_inff(), INT32_MAX, 0};
  const void* made = product_input(step, *step.m.head, count, (T*)b.hidden, liushui::kPartHead, w);
  product(step, *step.m.head, count, made, Output{nullptr, step.m.type, liushui::kHand, 0, keep_best<T>, &step},
          liushui::kPartHead, w);
  w.meet(liushui::kPartHead);
  const Deal mine = deal(count, w);
  for (long row = mine.begin; row < mine.end; row++) {
    Best best = step.s.best[row];
    for (long other = 1; other < w.count; other++) {
      const Best& more = step.s.best[other * count + row];
      best.spoiled |= more.spoiled;
      if (more.value > best.value || (more.value == best.value && more.token < best.token)) {
        best.value = more.value;
        best.token = more.token;
      }
    }
    const bool finite = best.value - best.value == 0.0f;
    b.tokens[row] = best.spoiled || !finite ? -1 : best.token;
  }
}

template <class T>
void step_body(void* context, int worker, int workers) {
  Step<T>& step = *(Step<T>*)context;
  const StepBatch& b = step.b;
  const long width = step.m.hidden;
  int64_t* times = b.times ? b.times + 2L * liushui::kParts * worker : nullptr;
  Worker w = {worker, workers, times, times ? Worker::now() : 0, 0};
  for (long layer = 0; layer < step.m.num_layers; layer++) layer_forward(step, layer, w);
  const Deal mine = deal(b.num_wanted, w);
  for (long i = mine.begin; i < mine.end; i++)
    norm_of((const T*)b.x, step.m.norm, step.m.norm_eps, width)(b.wanted[i], (T*)b.hidden + i * width);
  w.did(liushui::kPartNorm);
  if (b.num_tokens) {
    w.meet(liushui::kPartNorm);
    choose_tokens(step, w);
    w.did(liushui::kPartHead);
  }
}

constexpr int kWindows = 4;  // different ones in a model

// Attention's plans of all layers: one for each different window.
struct Plans {
  liushui::AttentionPlan of[kWindows];
  int window[kWindows];
  int count;

  bool add(const StepModel& m, const StepBatch& b, int threads, int layer_window, liushui::AttentionCut cut, int& index) {
    for (index = 0; index < count; index++)
      if (window[index] == layer_window) return true;
    if (count == kWindows) return false;
    const auto plan = liushui::plan_attention(threads, b.num_sequences, b.query_start, b.seq_lens, m.num_kv_heads,
                                              m.num_heads / m.num_kv_heads, layer_window, cut);
    using Task = liushui::AttentionTask;
    const size_t tasks = (size_t)plan.num_tasks, merges = (size_t)plan.num_merges;
    Task* copy = (Task*)malloc((tasks + merges + 1) * sizeof(Task));
    if (!copy) return false;
    memcpy(copy, plan.tasks, tasks * sizeof(Task));
    if (merges) memcpy(copy + tasks, plan.merges, merges * sizeof(Task));
    of[count] = plan;
    of[count].tasks = copy;
    of[count].merges = copy + tasks;
    window[count++] = layer_window;
    return true;
  }
  ~Plans() {
    for (int i = 0; i < count; i++) free((void*)of[i].tasks);
  }
};

// 0: done; 1: an index is out of range; 2: a model that a step cannot run.
template <class T>
int run_step(int threads, const StepModel& m, const StepBatch& b) {
  Attention<T, T> indices = {};
  indices.query_start = b.query_start, indices.seq_lens = b.seq_lens, indices.num_sequences = b.num_sequences;
  indices.rows = b.rows, indices.max_blocks = b.max_blocks, indices.block_size = m.block_size;
  if (!indices_fit(indices) || b.query_start[b.num_sequences] != b.rows || b.num_tokens > b.num_wanted) return 1;
  for (long i = 0; i < b.num_wanted; i++)
    if (b.wanted[i] < 0 || b.wanted[i] >= b.rows) return 1;
  if (b.rows == 0) return 0;
  Plans plans = {};
  const long products = m.num_layers * (1 + (b.rows + kStepRows - 1) / kStepRows * 4);
  const size_t plan_bytes = (size_t)m.num_layers * sizeof(liushui::AttentionPlan);
  const size_t taken_bytes = (size_t)(2 * m.num_layers + products) * sizeof(int32_t);
  liushui::AttentionPlan* of_layer =
      (liushui::AttentionPlan*)liushui::scratch(liushui::kPlans, plan_bytes + taken_bytes);
  int32_t* taken = (int32_t*)(of_layer + m.num_layers);
  memset(taken, 0, taken_bytes);
  long most_partials = 0;
  for (long i = 0; i < m.num_layers; i++) {
    int index;
    if (!plans.add(m, b, threads, m.layers[i].window, kCut<T>, index)) return 2;
    of_layer[i] = plans.of[index];
    most_partials = max_of(most_partials, (long)of_layer[i].num_partials);
  }
  float* partials = nullptr;
  if (most_partials)
    partials = (float*)liushui::scratch(
        liushui::kShared, (size_t)(most_partials * (round_up(m.head_dim, W) + 2)) * sizeof(float));
  Step<T> step = {m, b, divide(m, b.rows, b.num_tokens, threads, (char*)b.memory), threads, of_layer, partials, taken,
                  taken + 2 * m.num_layers, 0};
  liushui::region(threads, step_body<T>, &step);
  return step.bad;
}

}  // namespace

// Bytes of work space that a step of `rows` rows takes which chooses `num_tokens` tokens.
LS_EXPORT(size_t, step_bytes)(const StepModel* model, long rows, long num_tokens, int threads) {
  return divide(*model, rows, num_tokens, threads, nullptr).total;
}

LS_EXPORT(int, step)(int threads, const StepModel* model, const StepBatch* batch) {
  return (model->type ? run_step<bf16> : run_step<float>)(threads, *model, *batch);
}
