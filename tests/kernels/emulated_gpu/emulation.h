// Stands in for src/liushui/kernels/cuda/ptx.cuh on a CPU: every GPU thread is a fiber of one thread, and runs until it
// has to wait for others. Arithmetic is float32 without the GPU's roundings of sums and approximations.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <ucontext.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;

#define DEVICE inline
#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)
#define __grid_constant__

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { u32 x; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// -- fibers

struct Warp {
  int arrived = 0;
  u64 round = 0;
  u32 in[2][32][12], out[2][32][4];
};
struct Meeting { u64 round = 0; u32 arrived = 0; };
struct Block {
  Meeting meetings[16];
  std::vector<u8> shared = std::vector<u8>(232448);
  int arrived = 0;
  u64 round = 0;
  std::vector<Warp> warps;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<u8[]> stack;
  u32 thread, block;
  bool done = false, loads = false;  // loads: of matrices, that no fence follows yet
};
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static Fiber* self;
static ucontext_t scheduler;
static u64 progress;  // anything that another fiber may wait for

#define threadIdx (Index{self->thread})
#define blockIdx (Index{self->block})
#define gridDim (Index{static_cast<u32>(blocks.size())})

static inline Block& block() { return blocks[self->block]; }
static inline void yield() { swapcontext(&self->context, &scheduler); }
template <class Condition> static inline void wait_until(Condition condition) {
  while (!condition()) yield();
  progress++;
}
// All 32 threads of a warp hand in words; the last computes what each gets.
template <class Compute> static inline u32* together(const u32* words, int count, Compute compute) {
  Warp& w = block().warps[self->thread / 32];
  const u64 round = w.round;
  if (count) memcpy(w.in[round % 2][self->thread % 32], words, count * 4);
  progress++;
  if (++w.arrived == 32) {
    compute(w.in[round % 2], w.out[round % 2]);
    w.arrived = 0, w.round++;
  } else {
    wait_until([&] { return w.round != round; });
  }
  return w.out[round % 2][self->thread % 32];
}
template <class Step> static bool run(void (*kernel)(Step), const Step& step, int count, int threads) {
  static void (*entry)(Step);
  static const Step* argument;
  entry = kernel, argument = &step;
  blocks.assign(count, Block());
  fibers.clear();
  fibers.resize(count * threads);
  for (int i = 0; i < count * threads; i++) {
    Fiber& f = fibers[i];
    f.thread = i % threads, f.block = i / threads;
    if (f.thread == 0) blocks[f.block].warps.resize(threads / 32);
    f.stack.reset(new u8[65536]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 65536, f.context.uc_link = &scheduler;
    makecontext(&f.context, static_cast<void (*)()>([] { entry(*argument); self->done = true; progress++; yield(); }), 0);
  }
  for (bool left = true; left;) {
    const u64 before = progress;
    left = false;
    for (Fiber& f : fibers)
      if (!f.done) left = true, self = &f, swapcontext(&scheduler, &f.context);
    if (left && progress == before) {  // all wait for one another
      if (getenv("EMU")) for (Block& b : blocks) { fprintf(stderr, "block arrived %d;", b.arrived); for (Warp& w : b.warps) fprintf(stderr, " warp %d round %llu", w.arrived, w.round); fprintf(stderr, "\n"); }
      return false;
    }
  }
  return true;
}

// -- what CUDA has built in

static inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { return __uint_as_float(static_cast<u32>(x)); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline i64 __float2ll_rz(float x) { return static_cast<i64>(x); }
static inline float __ll2float_rn(i64 x) { return static_cast<float>(x); }
static inline u32 __byte_perm(u32 a, u32 b, u32 order) {
  const u64 both = static_cast<u64>(b) << 32 | a;
  u32 y = 0;
  for (int i = 0; i < 4; i++) y |= static_cast<u32>(both >> (order >> 4 * i & 7) * 8 & 255) << 8 * i;
  return y;
}
template <class T> static inline T __shfl_xor_sync(u32, T x, int mask) {
  u32 words[2] = {};
  memcpy(words, &x, sizeof(T));
  u32* got = together(words, 2, [&](u32(*in)[12], u32(*out)[4]) {
    for (int lane = 0; lane < 32; lane++) memcpy(out[lane], in[lane ^ mask], 8);
  });
  memcpy(&x, got, sizeof(T));
  return x;
}
static inline u32 __shfl_sync(u32, u32 x, int from) {
  const u32 words[2] = {x, static_cast<u32>(from)};
  return *together(words, 2, [](u32(*in)[12], u32(*out)[4]) {
    for (int lane = 0; lane < 32; lane++) out[lane][0] = in[in[lane][1] % 32][0];
  });
}
static inline void __syncwarp() { together(nullptr, 0, [](u32(*)[12], u32(*)[4]) {}); }
static inline void meet_in_block(u32 threads) {
  Block& b = block();
  const u64 round = b.round;
  progress++;
  if (++b.arrived == static_cast<int>(threads)) b.arrived = 0, b.round++;
  else wait_until([&] { return b.round != round; });
}
static inline void __syncthreads() { meet_in_block(block().warps.size() * 32); }
static inline u32 atomicAdd(u32* p, u32 x) { progress++; u32 old = *p; *p += x; return old; }

// -- ptx.cuh

static inline u16 narrow(float x) {
  u32 y = __float_as_uint(x);
  return static_cast<u16>(x != x ? 0x7FFF : (y + 0x7FFF + (y >> 16 & 1)) >> 16);
}
static inline float divide(float a, float b) { return a / b; }
static inline float exp2_flushed(float x) { return exp2f(x); }
static inline float exp2_plain(float x) { return exp2f(x); }
static inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
static inline u32 warp_max(u32 x) {
  return *together(&x, 1, [](u32(*in)[12], u32(*out)[4]) {
    u32 top = 0;
    for (int lane = 0; lane < 32; lane++) top = max(top, in[lane][0]);
    for (int lane = 0; lane < 32; lane++) out[lane][0] = top;
  });
}
static inline u32 warp_add(u32 x) {
  return *together(&x, 1, [](u32(*in)[12], u32(*out)[4]) {
    u32 sum = 0;
    for (int lane = 0; lane < 32; lane++) sum += in[lane][0];
    for (int lane = 0; lane < 32; lane++) out[lane][0] = sum;
  });
}
static inline u8* shared_memory() { return block().shared.data(); }
static inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const u8*>(p) - shared_memory()); }
template <class T> static inline T read(const void* p) { T x; memcpy(&x, p, sizeof(T)); return x; }
static inline u32 fresh32(const void* p) { return read<u32>(p); }
static inline u32 constant32(const void* p) { return read<u32>(p); }
static inline u16 constant16(const void* p) { return read<u16>(p); }
static inline uint2 constant64(const void* p) { return read<uint2>(p); }
static inline void send(u64* p, u32 word, u32 tag) { *p = static_cast<u64>(tag) << 32 | word; progress++; }
static inline void look(u64& x, const u64* p) { x = *p; }
static inline void look(u64 (&x)[2], const u64* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) abort();
  x[0] = p[0], x[1] = p[1];
}
template <class Ready> static inline void spin(Ready ready, u32, u32) { wait_until(ready); }

struct Barrier { u8 phase, arrivals; int16_t pending; int32_t bytes; };
static_assert(sizeof(Barrier) == 8, "as large as the GPU's");
static inline Barrier& barrier_at(u32 address) { return *reinterpret_cast<Barrier*>(shared_memory() + address); }
static inline void settle(Barrier& b) {
  progress++;
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals;
}
static inline void ring_init(u32 at, u32 arrivals) { barrier_at(at) = {0, static_cast<u8>(arrivals), static_cast<int16_t>(arrivals), 0}; }
static inline void ring_ready() {}
static inline bool ring_ready_for(u32 at, u32 parity) {
  const bool ready = barrier_at(at).phase != parity;
  progress += ready;  // who asks goes on
  return ready;
}
static inline void ring_release(u32 at, u32 count) {
  if (self->loads) fprintf(stderr, "a place is released, and copied to, while it may still be read: a fence is missing\n"), abort();
  barrier_at(at).pending -= count;
  if (barrier_at(at).pending < 0) abort();
  settle(barrier_at(at));
}
static inline void ring_expect(u32 at, u32 bytes) { barrier_at(at).bytes += bytes; ring_release(at, 1); }
// A tensor of rows of `columns` values; a box is 64 of them wide, its 16-byte pieces swizzled by address bits 7 to 9.
struct TensorMap { const u16* rows; i64 columns, height, box; u8 more[96]; };
static_assert(sizeof(TensorMap) == 128, "as large as the GPU's");
static inline void box_copy(u32 target, const TensorMap* map, int column, int row, u32 at) {
  if (target % 128 || row < 0 || row + map->box > map->height || column + 64 > map->columns) abort();
  for (int r = 0; r < map->box; r++)
    for (int piece = 0; piece < 8; piece++) {
      u32 place = target + r * 128 + piece * 16;
      place ^= (place >> 7 & 7) << 4;
      memcpy(shared_memory() + place, map->rows + (row + r) * map->columns + column + piece * 8, 16);
    }
  barrier_at(at).bytes -= map->box * 128;
  settle(barrier_at(at));
}
// A tensor's tile of 8 rows and 512 columns, 64 columns after 64.
static inline void tile_copy(u32 target, const TensorMap* map, int row, int chunk, u32 at) {
  if (target % 1024 || row < 0 || row + 8 > map->height || chunk * 64 + 512 > map->columns) abort();
  for (int i = 0; i < 512; i++) {  // pieces of 16 bytes
    u32 place = target + i * 16;
    place ^= (place >> 7 & 7) << 4;
    memcpy(shared_memory() + place, map->rows + (row + i / 8 % 8) * map->columns + (chunk + i / 64) * 64 + i % 8 * 8, 16);
  }
  barrier_at(at).bytes -= 8192;
  settle(barrier_at(at));
}
static inline void announce(const TensorMap*) {}
static inline void rest() {}
static inline void load_transposed(u32 (&r)[4], u32 address) {
  if (address % 16) abort();
  self->loads = true;
  u32* got = together(&address, 1, [](u32(*in)[12], u32(*out)[4]) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const auto at = [&](int row) { return read<u16>(shared_memory() + in[i * 8 + row][0] + lane / 4 * 2); };
        out[lane][i] = at(lane % 4 * 2) | static_cast<u32>(at(lane % 4 * 2 + 1)) << 16;
      }
  });
  memcpy(r, got, 16);
}
static inline bool elected() { return self->thread % 32 == 0; }
static inline int warp_index() { return self->thread / 32; }
static inline u32 uniform(u32 x) { return __shfl_sync(0, x, 0); }
template <u32 APART> static inline u32 chain_place(u32 address) { return (address & 0x3FFFF) >> 4 | APART >> 4 << 16; }
static inline u32 chain_apart(u32 bytes) { return bytes >> 4; }
static inline void chain_begin() {}
static inline void chain_end() {}
template <int LEFT> static inline void chain_wait(float (&)[4]) {}
static inline void fence_async() { self->loads = false; }
static inline void chain_step(float (&c)[4], u32 a, u32 apart, u32 b) {
  const u32 lane = self->thread % 32, first = self->thread / 32 % 4 * 16 + lane / 4;
  const auto wide = [](u32 at) { return __uint_as_float(static_cast<u32>(read<u16>(shared_memory() + at)) << 16); };
  for (u32 i = 0; i < 4; i++) {
    const u32 row = first + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    for (u32 k = 0; k < 16; k++) {
      u32 w = (a & 0x3FFF) * 16 + row / 8 * apart * 16 + row % 8 * 128 + k * 2;
      w ^= (w >> 7 & 7) << 4;
      const u32 x = (b & 0x3FFF) * 16 + k / 8 * (b >> 16) * 16 + token * 16 + k % 8 * 2;
      if (w + 2 > block().shared.size() || x + 2 > block().shared.size()) abort();
      c[i] += wide(w) * wide(x);
    }
  }
}
static inline void load_matrices(u32 (&r)[4], u32 address) {
  if (address % 16) abort();
  self->loads = true;
  u32* got = together(&address, 1, [](u32(*in)[12], u32(*out)[4]) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) out[lane][i] = read<u32>(shared_memory() + in[i * 8 + lane / 4][0] + lane % 4 * 4);
  });
  memcpy(r, got, 16);
}
static inline void multiply(float (&c)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  u32 words[6] = {a0, a2, b0, b1, __float_as_uint(c[0]), __float_as_uint(c[1])};
  u32* got = together(words, 6, [](u32(*in)[12], u32(*out)[4]) {
    const auto half = [](u32 x, int i) { return __uint_as_float(i ? x & 0xFFFF0000u : x << 16); };
    for (int lane = 0; lane < 32; lane++)
      for (int j = 0; j < 2; j++) {
        float sum = __uint_as_float(in[lane][4 + j]);
        for (int k = 0; k < 16; k++)
          sum += half(in[lane / 4 * 4 + k % 8 / 2][k / 8], k % 2) * half(in[(lane % 4 * 2 + j) * 4 + k % 8 / 2][2 + k / 8], k % 2);
        out[lane][j] = __float_as_uint(sum);
      }
  });
  c[0] = __uint_as_float(got[0]), c[1] = __uint_as_float(got[1]);
}
