// Scratch memory, the choice of instruction set and the cutting of attention into tasks. Compiled for the baseline of
// the architecture.
#include "library.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <vector>

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

namespace liushui {
namespace {

struct Buffers {
  void* data[kSlots] = {};
  size_t bytes[kSlots] = {};
  std::vector<AttentionTask> tasks, merges;
  ~Buffers() {
    for (void* p : data) free(p);
  }
};
thread_local Buffers buffers;

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  Buffers& own = buffers;
  if (own.bytes[slot] < bytes) {
    free(own.data[slot]);
    own.bytes[slot] = (bytes + bytes / 2 + 63) & ~size_t{63};
    own.data[slot] = aligned_alloc(64, own.bytes[slot]);
    if (!own.data[slot]) abort();
  }
  return own.data[slot];
}

void use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

AttentionPlan plan_attention(int threads, int num_sequences, const int32_t* query_start, const int32_t* seq_lens,
                             int num_kv_heads, int group, int window, AttentionCut cut) {
  int tile = std::max(1, cut.rows / group);
  // Rather smaller tasks than idle threads.
  const int64_t units = static_cast<int64_t>(query_start[num_sequences]) * num_kv_heads;
  while (tile > 1 && tile * group > 32 && units < static_cast<int64_t>(tile) * 4 * threads) tile = (tile + 1) / 2;
  auto& tasks = buffers.tasks;
  auto& merges = buffers.merges;
  tasks.clear();
  merges.clear();
  int longest = 1;
  for (int s = 0; s < num_sequences; s++) {
    const int queries = query_start[s + 1] - query_start[s];
    const int first = seq_lens[s] - queries;
    for (int from = (queries - 1) / tile * tile; from >= 0 && queries > 0; from -= tile) {
      AttentionTask task;
      task.sequence = s;
      task.row = query_start[s] + from;
      task.position = first + from;
      task.count = std::min(tile, queries - from);
      task.split_begin = window > 0 ? std::max(0, task.position - window + 1) / cut.split : 0;
      task.split_end = (task.position + task.count - 1) / cut.split + 1;
      task.partial = -1;
      longest = std::max(longest, task.split_end - task.split_begin);
      for (task.head = 0; task.head < num_kv_heads; task.head++) tasks.push_back(task);
    }
  }
  const auto cost = [](const AttentionTask& t) {
    return static_cast<int64_t>(t.split_end - t.split_begin) * (t.count + 4);
  };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const AttentionTask& a, const AttentionTask& b) { return cost(a) > cost(b); });
  AttentionPlan plan{};
  if (threads > 1 && longest > 1 && static_cast<int64_t>(tasks.size()) < 4 * static_cast<int64_t>(threads)) {
    merges.swap(tasks);
    tasks.clear();
    for (AttentionTask& whole : merges) {
      whole.partial = plan.num_partials;
      for (int split = whole.split_begin; split < whole.split_end; split++) {
        AttentionTask part = whole;
        part.split_begin = split;
        part.split_end = split + 1;
        part.partial = plan.num_partials;
        plan.num_partials += (static_cast<int64_t>(whole.count) * group + cut.align - 1) / cut.align * cut.align;
        tasks.push_back(part);
      }
    }
  }
  plan.tasks = tasks.data();
  plan.num_tasks = static_cast<long>(tasks.size());
  plan.merges = merges.data();
  plan.num_merges = static_cast<long>(merges.size());
  return plan;
}

}  // namespace liushui

LS_EXPORT void liushui_use_huge_pages(void* memory, size_t bytes) { liushui::use_huge_pages(memory, bytes); }
