// What the objects of all instruction sets share: threads, scratch memory and the order of attention's work.
// Plain C types only, so that nothing compiled here depends on an instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace liushui {

// Calls body(context, worker, workers) on several threads at once, the caller among them as worker 0. `workers` is
// `threads`, or fewer where no more can be had; 1 for a region within a region.
using RegionBody = void (*)(void* context, int worker, int workers);
void region(int threads, RegionBody body, void* context);

// Within a region: returns when all of its `workers` have come here.
void barrier(int workers);

// Calls body(context, task) once for every task in [0, tasks), on up to `threads` threads, in any order.
void parallel(int threads, long tasks, void (*body)(void*, long), void* context);

// Memory of the calling thread, 64-byte aligned, kept between calls. Each slot is one buffer.
enum Slot { kWork = 0, kShared = 1, kProduct = 2, kPlans = 3, kSlots = 4 };
void* scratch(Slot slot, size_t bytes);

// Asks for large pages behind memory not yet written (fewer misses of the address cache when it is streamed).
void use_huge_pages(void* memory, size_t bytes);

// A share of one sequence's attention: `count` query tokens from packed row `row` (position `position`), one KV
// head, the key splits [split_begin, split_end). `partial` is the first partial result it writes, or -1.
struct AttentionTask {
  int32_t sequence, head;
  int32_t row, position, count;
  int32_t split_begin, split_end;
  int64_t partial;
};

struct AttentionPlan {
  const AttentionTask* tasks;  // all the work; with `merges`, one task per split
  const AttentionTask* merges;  // whole-range tasks whose partial results are to be merged, in split order
  long num_tasks, num_merges;
  int64_t num_partials;  // rows of partial results
};

// Keys per split, without matrix tiles. A split is computed from nothing and merged in order, whether or not it ran on its own, so
// that spreading one long sequence over threads cannot be seen in the result.
constexpr int kSplit = 512;

// How attention is cut into tasks: keys per split, query rows (tokens times heads of the group) that share one reading
// of the keys, and the number of rows that partial results are rounded up to.
struct AttentionCut {
  int split, rows, align;
};

// Cuts the step into tasks, long ones first. The memory belongs to the calling thread, until its next call.
AttentionPlan plan_attention(int threads, int num_sequences, const int32_t* query_start, const int32_t* seq_lens,
                             int num_kv_heads, int group, int window, AttentionCut cut);

}  // namespace liushui
