// The pool of threads that a step runs on: one per process, made when first needed, asleep between steps. Compiled
// for the baseline of the architecture.
#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "library.h"

namespace liushui {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a waiting thread looks before it sleeps: first it holds its processor, then it offers it to others.
struct Patience {
  std::chrono::microseconds hold, offer;
};
// Between steps of one row is half a millisecond of Python; who sleeps then is late for the next one.
constexpr Patience kBetweenSteps = {std::chrono::microseconds(40), std::chrono::microseconds(1460)};
constexpr Patience kWithinStep = {std::chrono::microseconds(60), std::chrono::microseconds(400)};
constexpr Patience kCrowded = {std::chrono::microseconds(0), std::chrono::microseconds(20)};

// A number that only grows, and threads that wait for it to do so.
class Signal {
 public:
  uint32_t seen() const { return value_.load(std::memory_order_acquire); }

  void change() {
#if defined(__linux__)
    value_.fetch_add(1);  // before the look at the sleepers: whoever counts itself later sees the new value
    if (sleepers_.load()) futex(FUTEX_WAKE_PRIVATE, 0x7fffffff);
#else
    {
      std::lock_guard<std::mutex> lock(mutex_);
      value_.fetch_add(1);
    }
    changed_.notify_all();
#endif
  }

  // Returns when the value is no longer `old`.
  void wait(uint32_t old, Patience patience) {
    using clock = std::chrono::steady_clock;
    for (int i = 0; i < 64; i++) {
      if (seen() != old) return;
      relax();
    }
    const auto start = clock::now();
    for (auto now = start; now - start < patience.hold; now = clock::now())
      for (int i = 0; i < 16; i++) {
        if (seen() != old) return;
        relax();
      }
    for (auto now = start; now - start < patience.hold + patience.offer; now = clock::now()) {
      if (seen() != old) return;
      std::this_thread::yield();
    }
    sleep(old);
  }

 private:
#if defined(__linux__)
  void sleep(uint32_t old) {
    sleepers_.fetch_add(1);
    while (seen() == old) futex(FUTEX_WAIT_PRIVATE, old);
    sleepers_.fetch_sub(1);
  }
  void futex(int operation, uint32_t number) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), operation, number, nullptr, nullptr, 0);
  }
  std::atomic<uint32_t> sleepers_{0};
#else
  void sleep(uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return seen() != old; });
  }
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
  std::atomic<uint32_t> value_{0};
};
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain word");

#if defined(__linux__)
// Processors for the threads of a region, one each; empty if none should be pinned. Threads have places of their own
// only if they fill all that this process may use: with fewer threads the system knows better where it is quiet, and
// with more they would queue.
std::vector<int> choose_places(const cpu_set_t& allowed, int threads) {
  std::vector<int> cores, others;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    int first = cpu;
    if (FILE* file = fopen(path, "r")) {
      if (fscanf(file, "%d", &first) != 1) first = cpu;
      fclose(file);
    }
    // The first thread of its core, or the only one of them that may be used.
    (first == cpu || !CPU_ISSET(first, &allowed) ? cores : others).push_back(cpu);
  }
  const size_t wanted = static_cast<size_t>(threads);
  if (wanted == cores.size()) return cores;
  if (wanted != cores.size() + others.size()) return {};
  cores.insert(cores.end(), others.begin(), others.end());
  return cores;
}

bool pin(int cpu) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  return sched_setaffinity(0, sizeof one, &one) == 0;
}
#endif

// The caller's place for the time of one region.
class Stay {
 public:
  explicit Stay(int cpu) {
#if defined(__linux__)
    if (cpu < 0 || sched_getaffinity(0, sizeof before_, &before_) != 0 || !CPU_ISSET(cpu, &before_)) return;
    pinned_ = pin(cpu);
#else
    (void)cpu;
#endif
  }
  ~Stay() {
#if defined(__linux__)
    if (pinned_) sched_setaffinity(0, sizeof before_, &before_);
#endif
  }
  Stay(const Stay&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool pinned_ = false;
#endif
};

thread_local bool inside = false;  // of a region: another one in it runs on this thread alone

class Pool {
 public:
  void run(int threads, RegionBody body, void* context) {
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    prepare(threads);
    const int workers = static_cast<int>(workers_.size()) < threads - 1 ? static_cast<int>(workers_.size()) + 1 : threads;
    body_ = body;
    context_ = context;
    count_ = workers;
    running_.store(workers - 1);
    const uint32_t done = done_.seen();
    for (int i = 0; i < workers - 1; i++) workers_[static_cast<size_t>(i)]->start.change();
    {
      const Stay stay(place(0));
      inside = true;
      body(context, 0, workers);
      inside = false;
    }
    if (workers > 1) done_.wait(done, within_step());
  }

  void barrier(int workers) {
    const uint32_t turn = turn_.seen();
    if (arrived_.fetch_add(1) + 1 == workers) {
      arrived_.store(0);
      turn_.change();
    } else {
      turn_.wait(turn, within_step());
    }
  }

 private:
  struct alignas(64) Worker {
    Signal start;
    std::thread thread;
  };

  Patience within_step() const { return crowded_ ? kCrowded : kWithinStep; }

  int place(int worker) const {
    return static_cast<size_t>(worker) < places_.size() ? places_[static_cast<size_t>(worker)] : -1;
  }

  // Makes sure that there are workers, and decides where they stay.
  void prepare(int threads) {
    if (threads == prepared_) return;
    prepared_ = threads;
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
      crowded_ = CPU_COUNT(&allowed) < threads;
      places_ = choose_places(allowed, threads);
      allowed_ = allowed;
    }
#endif
    while (static_cast<int>(workers_.size()) < threads - 1) {
      std::unique_ptr<Worker> worker(new Worker);
      const int index = static_cast<int>(workers_.size()) + 1;
      sigset_t all, before;  // signals are for the program's own threads
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      try {
        Worker* own = worker.get();
        worker->thread = std::thread([this, own, index] { work(*own, index); });
      } catch (const std::system_error&) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return;  // fewer workers, then
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      workers_.push_back(std::move(worker));
    }
  }

  void work(Worker& own, int index) {
    inside = true;
    int stays = -1;
    Patience patience = kCrowded;
    for (uint32_t seen = 0;; seen++) {
      own.start.wait(seen, patience);
#if defined(__linux__)
      if (const int cpu = place(index); cpu != stays) {
        if (cpu >= 0)
          pin(cpu);
        else
          sched_setaffinity(0, sizeof allowed_, &allowed_);
        stays = cpu;
      }
#endif
      body_(context_, index, count_);
      patience = crowded_ ? kCrowded : kBetweenSteps;  // looked up while the caller waits
      if (running_.fetch_sub(1) == 1) done_.change();
    }
  }

  std::mutex callers_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<int> places_;
#if defined(__linux__)
  cpu_set_t allowed_;
#endif
  RegionBody body_ = nullptr;
  void* context_ = nullptr;
  int count_ = 0, prepared_ = 0;
  bool crowded_ = false;
  alignas(64) std::atomic<int> running_{0};
  Signal done_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) Signal turn_;
};

std::atomic<Pool*> pool{nullptr};

// Never freed: workers may sleep in it at exit. After a fork the child has no workers, so it starts a new pool.
Pool& the_pool() {
  Pool* current = pool.load();
  if (!current) {
    static std::once_flag registered;
    std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); inside = false; }); });
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made))
      current = made;
    else
      delete made;
  }
  return *current;
}

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

// void GOMP_parallel(fn, data, num_threads, flags) of the OpenMP runtime that torch has loaded: for models part of
// whose products are torch's, so that two pools do not fight for the same cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

void region(int threads, RegionBody body, void* context) {
  if (threads <= 1 || inside) return body(context, 0, 1);
  the_pool().run(threads, body, context);
}

void barrier(int workers) {
  if (workers > 1) pool.load(std::memory_order_relaxed)->barrier(workers);
}

void parallel(int threads, long tasks, void (*body)(void*, long), void* context) {
  if (threads <= 1 || tasks <= 1 || inside) {
    for (long task = 0; task < tasks; task++) body(context, task);
    return;
  }
  Job job;
  job.body = body;
  job.context = context;
  job.tasks = tasks;
  if (const GompParallel theirs = gomp_parallel.load())
    theirs(run_share, &job, static_cast<unsigned>(threads), 0);
  else
    the_pool().run(threads, [](void* shared, int, int) { run_share(shared); }, &job);
}

}  // namespace liushui

// Lets `parallel` run on torch's threads from now on; null: on the own ones.
extern "C" __attribute__((visibility("default"))) void liushui_use_openmp(void* function) {
  liushui::gomp_parallel.store(reinterpret_cast<liushui::GompParallel>(function));
}
