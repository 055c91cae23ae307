// Attention of prompts over the paged cache, on Hopper: the sums of `liushui.kernels.triton.attention`, in its order.
//
// One warp takes tiles of queries and copies them, keys and values into shared memory, ahead of WORKERS warpgroups that take
// 64 rows each, a row being one head of one token (Shah et al. 2024, arXiv:2407.08608). A warpgroup multiplies its queries
// with the next tile of keys while the matrix unit still weighs the values of the one before. Blocks are persistent: while
// warpgroups end one tile of queries, the next is on its way. Who takes which tile is decided as they go.
//
// None of that touches the bits: tiles of 64 keys in ascending order, the norm as a product of the weights with ones, splits
// of 512 keys merged in order. What is scaled by exactly 1 is left alone.
#define BN 64
#define PARTS 4
#define IN_A 32
#define IN_B 33
#define IN_KEEP 34
#if HALF
#define VALUES "f16"
#define ONES 0x3C003C00u
#else
#define VALUES "bf16"
#define ONES 0x3F803F80u
#endif
#include "hopper.cuh"

constexpr int TILE = 64, SPLIT = 512, ROWS = 64, HALVES = DIM / 64, SUMS = DIM / 2, GROUP = HEADS / KV_HEADS;
constexpr int TOKENS = WORKERS * ROWS / PADDED, OF_WORKER = ROWS / PADDED;  // of a block, and of a warpgroup
constexpr int THREADS = 128 * (WORKERS + 1), TAKEN = WORKERS == 2 ? 240 : 160, GIVEN = WORKERS == 2 ? 24 : 32;
constexpr bool IN_REGISTERS = WORKERS * DIM <= 256;  // the queries, where they leave room for the rest
constexpr int BOX = TILE * 128, TILE_BYTES = BOX * HALVES, TOTAL = 16 * DIM * 4, STRIDE = DIM * 2 + 16, MAIL = 4;
constexpr int LETTERS = 1024 + (K_STAGES + V_STAGES + WORKERS) * TILE_BYTES + WORKERS * 4 * TOTAL + 1024;
constexpr int SHARED = LETTERS + WORKERS * MAIL * 32 + (2 * K_STAGES + 2 * V_STAGES + 2 * WORKERS) * 8;
static_assert(SHARED <= 232448, "shared memory");
static_assert(16 * STRIDE <= TOTAL, "results on their way lie where the totals were");
extern "C" __device__ const int shared_bytes = SHARED;
#define MINUS_INFINITY __int_as_float(static_cast<int>(0xFF800000u))

struct Call {
  TensorMap q, k, v;
  u16* out;
  const int *query_start, *seq_lens, *block_table;
  u32* taken;  // zero before and after
  int sequences, table_stride;
  float scale;
};

// A wait of seconds is a mistake: better an error than a GPU that hangs. (With a trap here the compiler would leave a
// warpgroup no more registers than it has at its launch.)
DEVICE void await(u32 barrier, u32 parity) {
  if (ring_ready_for(barrier, parity)) return;
  const i64 start = clock64();
  while (!ring_ready_for(barrier, parity))
    if (clock64() - start > 4000000000ll) fault();
}

// A place of a ring, and the parity of its round.
template <u32 STAGES> struct Turn {
  u32 slot = 0, parity = 0;
  DEVICE void on() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};
typedef Turn<K_STAGES> Keys;
typedef Turn<V_STAGES> Values;

struct Shared {
  u32 keys, values, queries, totals, ones, letters, k_full, k_free, v_full, v_free, q_full, q_free;
  DEVICE Shared() {
    keys = (shared_address(shared_memory()) + 1023) & ~1023u;
    values = keys + K_STAGES * TILE_BYTES;
    queries = values + V_STAGES * TILE_BYTES;
    totals = queries + WORKERS * TILE_BYTES;
    ones = totals + WORKERS * 4 * TOTAL;
    letters = ones + 1024;
    k_full = letters + WORKERS * MAIL * 32;
    k_free = k_full + K_STAGES * 8, v_full = k_free + K_STAGES * 8, v_free = v_full + V_STAGES * 8;
    q_full = v_free + V_STAGES * 8, q_free = q_full + WORKERS * 8;
  }
  template <class T> DEVICE static T& at(u32 address) {
    return *reinterpret_cast<T*>(shared_memory() + (address - shared_address(shared_memory())));
  }
};

// What a warpgroup is told of its queries; `count` is 0 where nothing is left to do.
struct Letter {
  int head, first_row, count, skip, length, high, sequence, more;
};
// Of worker w, tile of queries `number` of this block; there until the worker has opened the queries of the next but two.
DEVICE Letter& letter(const Shared& s, int w, u32 number) { return Shared::at<Letter>(s.letters + (w * MAIL + number % MAIL) * 32); }

// -- the warp that copies

// The tile of queries with number `item`, the last sequence's last first: those see most keys. `count` is 0 where there is none;
// `total` is then how many there are.
DEVICE Letter look(const Call& call, int item, int& total) {
  const int lane = threadIdx.x % 32;
  Letter x = {};
  int left = item / KV_HEADS;
  for (int top = call.sequences - 1; top >= 0; top -= 32) {
    const int sequence = top - lane;
    int first_row = 0, count = 0;
    if (sequence >= 0) first_row = call.query_start[sequence], count = call.query_start[sequence + 1] - first_row;
    const int tiles = count > 1 ? (count + TOKENS - 1) / TOKENS : 0;
    int sum = tiles;  // of the lanes up to this one
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = (int)__shfl_sync(0xFFFFFFFFu, sum, lane - d & 31);
      if (lane >= d) sum += below;
    }
    const int owner = (int)warp_add(sum <= left), all = (int)__shfl_sync(0xFFFFFFFFu, sum, 31);
    if (owner < 32) {
      x.sequence = top - owner;
      x.first_row = (int)__shfl_sync(0xFFFFFFFFu, first_row, owner), x.count = (int)__shfl_sync(0xFFFFFFFFu, count, owner);
      x.skip = ((int)__shfl_sync(0xFFFFFFFFu, sum, owner) - 1 - left) * TOKENS;
      x.head = item % KV_HEADS;
      x.length = call.seq_lens[x.sequence];
      x.high = min(x.length, x.length - x.count + x.skip + TOKENS);
      return x;
    }
    left -= all, total += all * KV_HEADS;
  }
  return x;
}

DEVICE void copy_tile(u32 target, const TensorMap* map, int row, u32 full) {
  ring_expect(full, TILE_BYTES);
#pragma unroll
  for (int half = 0; half < HALVES; half++) fetch_2d<false>(target + half * BOX, map, half * 64, row, full, 0);
}

// Queries of worker w, or the word that there are no more.
DEVICE void send_queries(const Shared& s, const Call& call, const Letter& x, int w, u32 number) {
  const u32 full = s.q_full + w * 8, target = s.queries + w * TILE_BYTES;
  await(s.q_free + w * 8, (number & 1) ^ 1);
  if (threadIdx.x % 32 == 0) {
    letter(s, w, number) = x;
    if (x.count == 0) {
      ring_release(full, 1);
    } else {
      ring_expect(full, TILE_BYTES);
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        fetch_3d(target + half * BOX, &call.q, half * 64, x.head * GROUP, x.first_row + x.skip + w * OF_WORKER, full);
    }
  }
  __syncwarp();
}

// Keys and values of a tile of queries, which themselves come behind the first keys.
DEVICE void copy(const Shared& s, const Call& call, const Letter& x, u32 number, Keys& k, Values& v) {
  const int lane = threadIdx.x % 32, tiles = (x.high + TILE - 1) / TILE;
  const int* const table = call.block_table + (i64)x.sequence * call.table_stride;
  int entry = 0;
#pragma unroll 1
  for (int i = 0; i < tiles; i++, k.on(), v.on()) {
    if (i % 32 == 0) entry = i + lane < tiles ? table[(i + lane) * TILE / BLOCK] : 0;
    const int row = ((int)__shfl_sync(0xFFFFFFFFu, entry, i % 32) * KV_HEADS + x.head) * BLOCK + i * TILE % BLOCK;
    await(s.k_free + k.slot * 8, k.parity ^ 1);
    if (lane == 0) copy_tile(s.keys + k.slot * TILE_BYTES, &call.k, row, s.k_full + k.slot * 8);
    __syncwarp();
    if (i == 0)
      for (int w = 0; w < WORKERS; w++) send_queries(s, call, x, w, number);
    await(s.v_free + v.slot * 8, v.parity ^ 1);
    if (lane == 0) copy_tile(s.values + v.slot * TILE_BYTES, &call.v, row, s.v_full + v.slot * 8);
    __syncwarp();
  }
}

DEVICE void fetch(const Shared& s, const Call& call) {
  Keys k;
  Values v;
  u32 number = 0, taken = 0;
  int total = 0;
  for (int item = blockIdx.x;; number++) {
    u32 later = 0;
    const Letter x = look(call, item, total);
    if (x.count == 0) break;
    total = 0;
    if (threadIdx.x % 32 == 0) later = atomicAdd(call.taken, 1);
    copy(s, call, x, number, k, v);
    taken = uniform(later) + 1;
    item = gridDim.x + taken - 1;
  }
  for (int w = 0; w < WORKERS; w++) send_queries(s, call, Letter{}, w, number);
  if (taken == (u32)total && taken > 0 && threadIdx.x % 32 == 0) *call.taken = 0;  // the last to ask
}

// -- the warpgroups that multiply

typedef float Scores[TILE / 2];
DEVICE void mix(float (&d)[64], const u32* a, u64 values, u32 keep) { multiply_128<1>(d, a[0], a[1], a[2], a[3], values, keep); }
DEVICE void mix(float (&d)[32], const u32* a, u64 values, u32 keep) { multiply_64<1>(d, a[0], a[1], a[2], a[3], values, keep); }

struct Worker {
  const Shared& s;
  const Call& call;
  const int worker, warp, lane;
  float sums[SUMS], norms[4];
  u32 weights[TILE / 4], query[IN_REGISTERS ? DIM / 16 : 1][4];
  float m[2], top[2], norm[2];  // of rows lane / 4 and 8 below: the split's maximum, that of the splits before, their norm
  Keys coming, k;               // tiles to be multiplied, and to be released
  Values v;

  DEVICE Worker(const Shared& shared, const Call& c, int w)
      : s(shared), call(c), worker(w), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

  DEVICE void release(u32 barrier) const {
    if (threadIdx.x % 128 == 0) ring_release(barrier, 1);
  }
  DEVICE void release_queries() const {
    __syncwarp();
    if (lane == 0) ring_release(s.q_free + worker * 8, 1);
  }
  // The queries that have come.
  DEVICE void open() {
    if (!IN_REGISTERS) return;
    const int row = warp * 16 + lane % 16;
    const u32 line = s.queries + worker * TILE_BYTES + row * 128;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) load_matrices(query[i * IN_REGISTERS], line + i / 4 * BOX + ((i % 4 * 2 + lane / 16 ^ row % 8) << 4));
    fence_async();
    release_queries();
  }

  // Start scores = queries keys^T.
  DEVICE void score(Scores& scores) {
    await(s.k_full + coming.slot * 8, coming.parity);
    const u64 a = tile_at(s.queries + worker * TILE_BYTES), b = tile_at(s.keys + coming.slot * TILE_BYTES);
    chain_begin();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
      const u32 step = i / 4 * (BOX / 16) + i % 4 * 2;
      const u32* const q = query[i * IN_REGISTERS];
      if (IN_REGISTERS) multiply_64<0>(scores, q[0], q[1], q[2], q[3], b + step, i > 0);
      else multiply_tiles(scores, a + step, b + step, i > 0);
    }
    chain_end();
    coming.on();
  }
  template <int LEFT> DEVICE void scored(Scores& scores) {
    products_wait<LEFT>();
    settle(scores);
    release(s.k_free + k.slot * 8);
    k.on();
  }
  // Start sums = (keep ? sums : 0) + weights values, and norms with ones for values.
  DEVICE void weigh(bool keep) {
    await(s.v_full + v.slot * 8, v.parity);
    const u64 b = columns_at(s.values + v.slot * TILE_BYTES, BOX);
    chain_begin();
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) mix(sums, weights + i * 4, b + i * 128, i > 0 || keep);
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
      const u32* const a = weights + i * 4;
      multiply_8(norms, a[0], a[1], a[2], a[3], tile_at(s.ones), i > 0 || keep);
    }
    chain_end();
  }
  DEVICE void weighed() {
    products_wait<0>();
    settle(sums), settle(norms);
    release(s.v_free + v.slot * 8);
    v.on();
  }
  // A tile that none of the rows sees, but other warpgroups do.
  DEVICE void pass() {
    await(s.k_full + coming.slot * 8, coming.parity);
    release(s.k_free + k.slot * 8);
    coming.on(), k.on();
    await(s.v_full + v.slot * 8, v.parity);
    release(s.v_free + v.slot * 8);
    v.on();
  }
  // What lies behind a row's own position is not seen: minus infinity.
  DEVICE void mask(Scores& scores, int start, int position, int further) {
    const int column = start + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILE / 2; i++)
      if (column + i / 4 * 8 + i % 2 > (i / 2 % 2 ? further : position)) scores[i] = MINUS_INFINITY;
  }
  // Scores become weights; `alpha`: what was summed before is to be scaled by.
  DEVICE void soften(Scores& scores, float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float high = fmaxf(scores[half * 2], scores[half * 2 + 1]);
#pragma unroll
      for (int i = 4; i < TILE / 2; i += 4) high = fmaxf(high, fmaxf(scores[i + half * 2], scores[i + half * 2 + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, 2));
      const float raised = fmaxf(m[half], __fmul_rn(high, call.scale)), safe = raised == MINUS_INFINITY ? 0.0f : raised;
      alpha[half] = exp2_flushed(__fsub_rn(m[half], safe));
      m[half] = raised;
#pragma unroll
      for (int i = 0; i < TILE / 2; i += 4)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = scores[i + half * 2 + j];
          x = exp2_flushed(__fmaf_rn(x, call.scale, -safe));
        }
    }
    settle(scores), settle(alpha);  // before the wait for the other products
  }
  DEVICE void pack(const Scores& scores) {
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) weights[i] = rounded(scores[i * 2], scores[i * 2 + 1]);
  }
  DEVICE void rescale(const float (&alpha)[2]) {
    if (!warp_any(alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = __fmul_rn(sums[i], alpha[i / 2 % 2]);
#pragma unroll
    for (int i = 0; i < 4; i++) norms[i] = __fmul_rn(norms[i], alpha[i / 2]);
  }
  // One more split, of maxima `split`, into the totals; the last stays in `sums`.
  DEVICE void merge(const float (&split)[2], bool first, bool last) {
    float a[2], b[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float raised = fmaxf(top[half], split[half]), safe = raised == MINUS_INFINITY ? 0.0f : raised;
      a[half] = exp2_flushed(__fsub_rn(top[half], safe)), b[half] = exp2_flushed(__fsub_rn(split[half], safe));
      top[half] = raised;
      norm[half] = __fmaf_rn(norm[half], a[half], __fmul_rn(norms[half * 2], b[half]));
    }
    float4* const totals = &Shared::at<float4>(s.totals + (worker * 4 + warp) * TOTAL) + lane;
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (!first) x = totals[i * 8];
      x.x = __fmaf_rn(x.x, a[0], __fmul_rn(sums[i], b[0]));
      x.y = __fmaf_rn(x.y, a[0], __fmul_rn(sums[i + 1], b[0]));
      x.z = __fmaf_rn(x.z, a[1], __fmul_rn(sums[i + 2], b[1]));
      x.w = __fmaf_rn(x.w, a[1], __fmul_rn(sums[i + 3], b[1]));
      if (!last) totals[i * 8] = x;
      sums[i] = x.x, sums[i + 1] = x.y, sums[i + 2] = x.z, sums[i + 3] = x.w;
    }
  }
  // Zeros for the values behind the last key: they may be anything, NaN too. All warpgroups write the same.
  DEVICE void clean(int high) const {
    await(s.v_full + v.slot * 8, v.parity);
    const int from = high % TILE * 8;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
      for (int i = from + threadIdx.x % 128; i < TILE * 8; i += 128) Shared::at<uint4>(s.values + v.slot * TILE_BYTES + half * BOX + i * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
    meet(1 + worker, 128);
  }
  // A warp's 16 rows, by way of its part of shared memory: so that it writes whole lines.
  DEVICE void write(const Letter& x) {
    const u32 staging = s.totals + (worker * 4 + warp) * TOTAL, at = staging + lane % 16 * STRIDE + lane / 16 * 16;
    __syncwarp();
    const float low = norm[0] == 0.0f ? 1.0f : norm[0], high = norm[1] == 0.0f ? 1.0f : norm[1];
#pragma unroll
    for (int i = 0; i < SUMS; i += 8)
      store_matrices(
          at + i * 4, rounded(divide(sums[i], low), divide(sums[i + 1], low)), rounded(divide(sums[i + 2], high), divide(sums[i + 3], high)),
          rounded(divide(sums[i + 4], low), divide(sums[i + 5], low)), rounded(divide(sums[i + 6], high), divide(sums[i + 7], high)));
    __syncwarp();
    constexpr int PIECES = DIM / 8;
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
      const int piece = i * 32 + lane, r = piece / PIECES, c = piece % PIECES;
      const int row = worker * ROWS + warp * 16 + r, token = x.skip + row / PADDED, member = row % PADDED;
      const uint4 found = shared128(staging + r * STRIDE + c * 16);
      if (token < x.count && member < GROUP)
        *reinterpret_cast<uint4*>(call.out + ((i64)(x.first_row + token) * HEADS + x.head * GROUP + member) * DIM + c * 8) = found;
    }
    __syncwarp();
  }

  // All keys that the rows of a tile of queries see, split by split, but for the last merge. The first scores are there.
  DEVICE int attend(const Letter& x, Scores& scores) {
    const int row = worker * ROWS + warp * 16 + lane / 4, before = x.length - x.count + x.skip, first = worker * OF_WORKER;
    const int position = before + row / PADDED, further = before + (row + 8) / PADDED;
    const int high = x.skip + first < x.count ? min(x.high, before + first + OF_WORKER) : 1;
    const int tiles = (high + TILE - 1) / TILE, clear = (before + first + 1) / TILE;  // what the first row sees, all see
    float alpha[2], split[2];
    m[0] = m[1] = top[0] = top[1] = MINUS_INFINITY, norm[0] = norm[1] = 0.0f;
    if (!IN_REGISTERS && tiles == 1) release_queries();
    if (clear == 0) mask(scores, 0, position, further);
    soften(scores, alpha);
    pack(scores);
#pragma unroll 1
    for (int i = 1; i < tiles; i++) {
      const bool begins = i % (SPLIT / TILE) == 0;
      score(scores);
      weigh((i - 1) % (SPLIT / TILE) != 0);
      scored<1>(scores);
      if (!IN_REGISTERS && i == tiles - 1) release_queries();
      if (begins) split[0] = m[0], split[1] = m[1], m[0] = m[1] = MINUS_INFINITY;
      if (i >= clear) mask(scores, i * TILE, position, further);
      soften(scores, alpha);
      if (begins) {  // the wait lies in both branches: else the compiler has it before the exponentials
        weighed();
        merge(split, i == SPLIT / TILE, false);
      } else {
        weighed();
        rescale(alpha);
      }
      pack(scores);
    }
    if (tiles * TILE > x.high) clean(x.high);
    weigh((tiles - 1) % (SPLIT / TILE) != 0);
    weighed();
    for (int i = tiles; i * TILE < x.high; i++) pass();
    return tiles;
  }
  // Wait for the next queries and start their first scores. False: there are none.
  DEVICE bool begin(u32 number, Scores& scores) {
    await(s.q_full + worker * 8, number & 1);
    if (letter(s, worker, number).count == 0) return false;
    open();
    score(scores);
    return true;
  }
  // Tiles of queries one after the other: while one ends, the next one's first scores are on their way.
  DEVICE void work() {
    Scores scores;
    if (!begin(0, scores)) return;
    scored<0>(scores);
    u32 number = 0;
    int tiles;
#pragma unroll 1
    for (;; number++) {
      tiles = attend(letter(s, worker, number), scores);
      if (!begin(number + 1, scores)) break;
      products_wait<1>();  // for nothing: tells the compiler that these sums are not under way
      settle(sums), settle(norms);
      merge(m, tiles <= SPLIT / TILE, true);
      write(letter(s, worker, number));
      scored<0>(scores);
    }
    merge(m, tiles <= SPLIT / TILE, true);
    write(letter(s, worker, number));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(const __grid_constant__ Call call) {
  const Shared s;
  if (threadIdx.x == 0) {
    announce(&call.q), announce(&call.k), announce(&call.v);
    for (int i = 0; i < K_STAGES; i++) ring_init(s.k_full + i * 8, 1), ring_init(s.k_free + i * 8, WORKERS);
    for (int i = 0; i < V_STAGES; i++) ring_init(s.v_full + i * 8, 1), ring_init(s.v_free + i * 8, WORKERS);
    for (int w = 0; w < WORKERS; w++) ring_init(s.q_full + w * 8, 1), ring_init(s.q_free + w * 8, 4);
    ring_ready();
  }
  for (int i = threadIdx.x; i < 256; i += THREADS) Shared::at<u32>(s.ones + i * 4) = ONES;
  fence_async();
  if (CHAINED) {
    await_kernels_before();
    let_next_kernel_start();
  }
  __syncthreads();
  const int worker = warp_index() / 4;
  if (worker == WORKERS) {
    give_registers<GIVEN>();
    if (warp_index() % 4 == 0) fetch(s, call);
  } else {
    take_registers<TAKEN>();
    Worker(s, call, worker).work();
  }
}
