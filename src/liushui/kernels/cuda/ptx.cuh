// Single instructions, spelled in PTX so that they are those of the Triton kernels; no header is needed (NVRTC).
#ifndef LIUSHUI_PTX
#define LIUSHUI_PTX

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

// -- arithmetic

DEVICE u16 narrow(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float divide(float a, float b) {
  float c;
  asm("div.full.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
DEVICE float exp2_flushed(float x) {  // tl.exp2
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float exp2_plain(float x) {  // within tl.exp
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 warp_add(u32 x) {
  u32 y;
  asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
DEVICE u32 warp_max(u32 x) {
  u32 y;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}

// The compiler then knows that it is one for the whole warp.
DEVICE u32 uniform(u32 x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
DEVICE int warp_index() { return __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0); }

// -- memory

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE u8* shared_memory() {
  extern __shared__ __align__(1024) u8 memory[];
  return memory;
}

// GUARD: a wait of seconds is a mistake; better an error than a GPU that hangs. Who waits for what goes to `stuck` (memory
// of the host, one word for each warp: site, number) a while before the trap.
#if GUARD
__device__ u64* stuck;
__device__ __noinline__ void give_up(u32 site, u32 number) {
  if (stuck != nullptr) *reinterpret_cast<volatile u64*>(stuck + blockIdx.x * 9 + threadIdx.x / 32) = static_cast<u64>(site) << 32 | number;
  const long long start = clock64();
  while (clock64() - start < 1000000000ll) {}
  asm volatile("trap;");
}
#endif
template <class Ready> DEVICE void spin(Ready ready, u32 site = 0, u32 number = 0) {
#if GUARD
  if (ready()) return;
  const long long start = clock64();
  while (!ready())
    if (clock64() - start > 4000000000ll) give_up(site, number);
#else
  while (!ready()) {}
#endif
}

// Written by other multiprocessors in this launch: not from the first-level cache.
DEVICE u32 fresh32(const void* p) {
  u32 x;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// Never written in this launch; volatile so that it is asked for where the source says.
DEVICE u32 constant32(const void* p) {
  u32 x;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
DEVICE u16 constant16(const void* p) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}
DEVICE uint2 constant64(const void* p) {
  uint2 x;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}

// -- words that carry their tag: one 64-bit store, one 64-bit load of two (PTX: each element is read in one piece)

DEVICE void send(u64* p, u32 word, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(static_cast<u64>(tag) << 32 | word) : "memory");
}
DEVICE void look(u64 (&x)[2], const u64* p) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(x[0]), "=l"(x[1]) : "l"(p) : "memory");
}
DEVICE void look(u64& x, const u64* p) {
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
}

// Between two looks: those who wait should not hold up the words they wait for.
DEVICE void rest() { __nanosleep(100); }

DEVICE void ring_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void ring_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE bool ring_ready_for(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
DEVICE void ring_release(u32 barrier, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void ring_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// One thread of the warp, which is together here: what it does needs no loop over lanes.
DEVICE bool elected() {
  u32 mine;
  asm volatile("{\n.reg .pred mine;\nelect.sync _|mine, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, mine;\n}" : "=r"(mine));
  return mine != 0;
}
struct alignas(64) TensorMap { u8 bytes[128]; };
// Boxes of 64 columns, their 16-byte pieces swizzled by the address bits 7 to 9. Weights pass the second-level cache once
// and should not drive out what the blocks hand to one another.
DEVICE void tile_copy(u32 target, const TensorMap* map, int row, int chunk, u32 barrier) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
      "l"(map), "r"(0), "r"(row), "r"(chunk), "r"(barrier), "l"(policy) : "memory");
}
DEVICE void announce(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void box_copy(u32 target, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// -- the matrix unit

DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// c [16, 8] += a [16, 16] b [16, 8], of which rows 8 to 15 of a are zero.
DEVICE void multiply(float (&c)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
}

// wgmma: c [64, 8] += a [64, 16] b [16, 8], both in shared memory, a warp has 16 rows. `a`: rows of a tile of 8 lie 128 bytes
// apart, swizzled, tiles `apart`; `b`: tokens lie 16 bytes apart, the halves of K as `chain_place` is told.
template <u32 APART> DEVICE u32 chain_place(u32 address) { return (address & 0x3FFFF) >> 4 | APART >> 4 << 16; }
DEVICE u32 chain_apart(u32 bytes) { return bytes >> 4 | 1u << 30; }
DEVICE void chain_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void chain_step(float (&c)[4], u32 a, u32 apart, u32 b) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 x, y;\nsetp.ne.b32 p, 1, 0;\nmov.b64 x, {%4, %6};\nmov.b64 y, {%5, 0};\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, x, y, p, 1, 1, 0, 0;\n}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a), "r"(b), "r"(apart));
}
DEVICE void chain_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void chain_wait(float (&c)[4]) {
  asm volatile("wgmma.wait_group.sync.aligned %4;" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "n"(LEFT) : "memory");
}
// Between ordinary stores to shared memory and what wgmma reads there next; and between ordinary loads, `load_matrices` too,
// and the word that the copy engine may write there: without it, the copy can be there before the load has read.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// `threads` threads of a block, a multiple of 32.
DEVICE void meet_in_block(u32 threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
#endif
