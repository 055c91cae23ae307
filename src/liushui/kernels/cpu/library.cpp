// Threads, scratch memory, the choice of instruction set and the cutting of attention into tasks. Compiled for
// the baseline of the architecture.
#include "library.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

namespace liushui {
namespace {

struct Job {
  void (*body)(void*, long);
  void* context;
  long tasks;
  std::atomic<long> next{0};
};

void run_share(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  for (long task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.body(job.context, task);
}

// void GOMP_parallel(fn, data, num_threads, flags) of the OpenMP runtime that torch has loaded: its threads are
// then ours too, instead of two pools that fight for the same cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The pool for where there is none to share. Whoever waits looks for a short while (a step is many jobs in a row),
// then sleeps.
class Pool {
 public:
  void run(int threads, Job& job) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int index = static_cast<int>(workers_.size());
      const uint64_t seen = generation_.load();
      workers_.emplace_back([this, index, seen] { work(index, seen); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      running_.store(static_cast<int>(workers_.size()));  // all take note of a job, `wanted_` of them work on it
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    run_share(&job);
    wait(done_, [this] { return running_.load() == 0; });
  }

 private:
  template <class Condition>
  void wait(std::condition_variable& signal, Condition condition) {
    for (int i = 0; i < 4000; i++) {
      if (condition()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    signal.wait(lock, condition);
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      wait(wake_, [&] { return generation_.load() != seen; });
      seen++;
      if (index < wanted_) run_share(job_);
      if (running_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0;
  std::atomic<int> running_{0};
  std::atomic<uint64_t> generation_{0};
};

std::atomic<Pool*> pool{nullptr};

// Never freed: workers may sleep in it at exit. After a fork the child has no workers, so it starts a new pool.
Pool& the_pool() {
  Pool* current = pool.load();
  if (!current) {
    static std::once_flag registered;
    std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made))
      current = made;
    else
      delete made;
  }
  return *current;
}

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

void parallel(int threads, long tasks, void (*body)(void*, long), void* context) {
  if (threads <= 1 || tasks <= 1) {
    for (long task = 0; task < tasks; task++) body(context, task);
    return;
  }
  Job job;
  job.body = body;
  job.context = context;
  job.tasks = tasks;
  if (gomp_parallel)
    gomp_parallel(run_share, &job, static_cast<unsigned>(threads), 0);
  else
    the_pool().run(threads, job);
}

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
                             int num_kv_heads, int group, int window) {
  constexpr int kRows = 96;  // query rows (tokens times heads of the group) that share one reading of the keys
  const int tile = std::max(1, kRows / group);
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
      task.split_begin = window > 0 ? std::max(0, task.position - window + 1) / kSplit : 0;
      task.split_end = (task.position + task.count - 1) / kSplit + 1;
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
        plan.num_partials += static_cast<int64_t>(whole.count) * group;
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

// Whether this processor (and its system) can run the code compiled for an instruction set.
LS_EXPORT int liushui_supports(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !strcmp(isa, "generic");
}

LS_EXPORT void liushui_use_openmp(void* function) {
  liushui::gomp_parallel = reinterpret_cast<liushui::GompParallel>(function);
}
