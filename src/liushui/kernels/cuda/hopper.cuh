// Hopper's own instructions for matrix products (PTX ISA 8.0: wgmma, mbarrier, cp.async.bulk.tensor, clusters).
#pragma once
#include "exact.cuh"
#ifndef LIUSHUI_HOPPER
#define LIUSHUI_HOPPER

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// -- the block in its cluster

DEVICE u32 cluster_rank() {
  u32 x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
DEVICE u32 cluster_index() {
  u32 x;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(x));
  return x;
}
DEVICE u32 cluster_count() {
  u32 x;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(x));
  return x;
}
DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// One arrival at the barrier that lies at `barrier` in block `rank` of the cluster.
DEVICE void release_in(u32 barrier, u32 rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// -- copies of boxes, to this block, or to all blocks of `mask` (MANY)

template <bool MANY> DEVICE void fetch_2d(u32 target, const TensorMap* map, int column, int row, u32 barrier, u32 mask) {
  if (MANY)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<u16>(mask)) : "memory");
  else
    box_copy(target, map, column, row, barrier);
}
DEVICE void fetch_3d(u32 target, const TensorMap* map, int column, int second, int third, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
      "l"(map), "r"(column), "r"(second), "r"(third), "r"(barrier) : "memory");
}
// Groups of eight rows, of one half of the tensor and the other in turn.
template <bool MANY> DEVICE void fetch_pairs(u32 target, const TensorMap* map, int column, int group, u32 barrier, u32 mask) {
  if (MANY)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(target), "l"(map), "r"(column), "r"(0), "r"(group), "r"(barrier),
        "h"(static_cast<u16>(mask)) : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4}], [%5];" ::"r"(
            target), "l"(map), "r"(column), "r"(0), "r"(group), "r"(barrier) : "memory");
}

// -- the matrix unit of a warpgroup

#ifndef VALUES
#define VALUES "bf16"  // or f16: what is multiplied
#endif

// The register file is that of four parts of a multiprocessor: nine warps leave 168 registers for each, unless they deal.
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Between `chain_begin` and `chain_end` (`ptx.cuh`).
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// A tile in shared memory whose rows are 128 bytes, in groups of eight, swizzled as the copies do; 1,024-byte aligned.
DEVICE u64 tile_at(u32 address) { return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

#define NUMBERS_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_2 NUMBERS_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_3 NUMBERS_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NUMBERS_4 NUMBERS_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_5 NUMBERS_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NUMBERS_6 NUMBERS_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_7 NUMBERS_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NUMBERS_8 NUMBERS_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_9 NUMBERS_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NUMBERS_10 NUMBERS_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NUMBERS_11 NUMBERS_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NUMBERS_12 NUMBERS_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NUMBERS_13 NUMBERS_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NUMBERS_14 NUMBERS_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NUMBERS_15 NUMBERS_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NUMBERS_16 NUMBERS_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_1 EIGHT(0)
#define SUMS_2 SUMS_1, EIGHT(8)
#define SUMS_3 SUMS_2, EIGHT(16)
#define SUMS_4 SUMS_3, EIGHT(24)
#define SUMS_5 SUMS_4, EIGHT(32)
#define SUMS_6 SUMS_5, EIGHT(40)
#define SUMS_7 SUMS_6, EIGHT(48)
#define SUMS_8 SUMS_7, EIGHT(56)
#define SUMS_9 SUMS_8, EIGHT(64)
#define SUMS_10 SUMS_9, EIGHT(72)
#define SUMS_11 SUMS_10, EIGHT(80)
#define SUMS_12 SUMS_11, EIGHT(88)
#define SUMS_13 SUMS_12, EIGHT(96)
#define SUMS_14 SUMS_13, EIGHT(104)
#define SUMS_15 SUMS_14, EIGHT(112)
#define SUMS_16 SUMS_15, EIGHT(120)

// d [64, BN] of a warpgroup = (keep ? d : 0) + a [64, 16] b [BN, 16]^T. The host sets PARTS = BN / 16, and the numbers of the inputs.
DEVICE void multiply_tiles(float (&d)[BN / 2], u64 a, u64 b, u32 keep) {
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" TEXT(IN_KEEP) ", 0;\nwgmma.mma_async.sync.aligned.m64n" TEXT(
                   BN) "k16.f32." VALUES "." VALUES " {" JOIN(NUMBERS_, PARTS) "}, %" TEXT(IN_A) ", %" TEXT(IN_B) ", keep, 1, 1, 0, 0;\n}"
               : JOIN(SUMS_, PARTS) : "l"(a), "l"(b), "r"(keep));
}
// What reads the sums stays behind the wait for them.
template <int COUNT> DEVICE void settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same with `a` in registers: four words, of rows lane / 4 and 8 below by turns, columns 2 (lane % 4) and 8 further on.
#define MULTIPLY_REGISTERS(N, PARTS_, A, B, KEEP)                                                                              \
  template <int BY_COLUMNS> DEVICE void multiply_##N(float (&d)[N / 2], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) {      \
    asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " KEEP ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                   \
                 "k16.f32." VALUES "." VALUES " {" NUMBERS_##PARTS_ "}, {" A "}, " B ", keep, 1, 1, %" BY_##PARTS_ ";\n}"                  \
                 : SUMS_##PARTS_ : "r"(a), "r"(b), "r"(c), "r"(e), "l"(tile), "r"(keep), "n"(BY_COLUMNS));                     \
  }
#define BY_4 "38"
#define BY_8 "70"
MULTIPLY_REGISTERS(64, 4, "%32, %33, %34, %35", "%36", "%37")
MULTIPLY_REGISTERS(128, 8, "%64, %65, %66, %67", "%68", "%69")
DEVICE void multiply_8(float (&d)[4], u32 a, u32 b, u32 c, u32 e, u64 tile, u32 keep) {
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %9, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32." VALUES "." VALUES " {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, %8, keep, 1, 1, 0;\n}"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b), "r"(c), "r"(e), "l"(tile), "r"(keep));
}
// A tile whose rows are K (BY_COLUMNS): boxes of 64 columns, so many bytes from one to the next.
DEVICE u64 columns_at(u32 address, u32 apart) { return tile_at(address) & ~0xFFFF0000ull | (u64)(apart >> 4) << 16; }

DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Two numbers as bfloat16, or float16.
DEVICE u32 rounded(float low, float high) {
  u32 x;
  asm("cvt.rn." VALUES "x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE uint4 shared128(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
DEVICE bool warp_any(bool x) { return __any_sync(0xFFFFFFFFu, x); }
DEVICE void meet(u32 barrier, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEVICE void report(u32 barrier, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

DEVICE void give_up() { asm volatile("trap;"); }
DEVICE void fault() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

// -- beside the kernels before and after (programmatic dependent launch)

DEVICE void await_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif
