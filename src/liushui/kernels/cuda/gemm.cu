// y = x w^T in bfloat16 for many rows, on Hopper: one accumulator that takes K in ascending order.
//
// One warp copies tiles of x (BM rows) and of w (BN rows), 64 columns at a time, into a ring in shared memory; warpgroups
// multiply them (wgmma) and write the results. TEAM warpgroups share the rows of a tile; TEAMS teams have tiles of their
// own, so that one writes while another multiplies. Blocks are persistent. A cluster of DOWN blocks has tiles one below
// another; each fetches a part of the weights that they share, for all of them.
//
// GATED: w has twice as many rows as y has columns, and y = silu(x Wg) * (x Wu). Groups of eight rows of the two halves lie
// in turn in a tile, so that a thread has both sums of an element; they are rounded to bfloat16 first, as the separate
// kernels round them.
#include "hopper.cuh"

constexpr int DEPTH = 64, ROWS_OF_TEAM_MEMBER = 64 * TALL, BM = ROWS_OF_TEAM_MEMBER * TEAM, WIDE = GATED ? BN / 2 : BN;
constexpr int SLOT = (BM + BN) * DEPTH * 2, WORKERS = TEAM * TEAMS, CHUNK = 64, STRIDE = CHUNK * 2 + 16;
constexpr int THREADS = WORKERS == 2 ? 384 : 128 * WORKERS + 32;  // dealing with registers takes a whole warpgroup
// What each of three warpgroups has at its launch, and what they make of it: for more than there is they would wait for ever.
constexpr int LAUNCHED = 168, TAKEN = 232, GIVEN = 40;
static_assert(2 * TAKEN + GIVEN <= 3 * LAUNCHED, "registers");
constexpr int STAGED = 16 * STRIDE;
constexpr int SHARED = 1024 + SLOTS * SLOT + WORKERS * 4 * STAGED + SLOTS * 16;
static_assert(SHARED <= 232448, "shared memory");
static_assert(TEAMS <= 2, "teams take turns in pairs");
static_assert(BN == PARTS * 16 && BN % ((GATED ? 16 : 8) * DOWN) == 0, "tiles");
extern "C" __device__ const int shared_bytes = SHARED;

struct Call {
  TensorMap x, w;
  u16* out;
  int rows, columns, steps, down, across, band;  // tiles of clusters down and across; how many down before going across
};

struct Tile {
  int row, column;
  // Of block `rank` of the cluster that has tile number `index`.
  DEVICE Tile(const Call& call, int index, int rank) {
    const int in_band = call.band * call.across, first = index / in_band * call.band, rest = index % in_band;
    const int high = min(call.band, call.down - first);
    row = ((first + rest % high) * DOWN + rank) * BM;
    column = rest / high * WIDE;
  }
};

// A wait of seconds is a mistake: better an error than a GPU that hangs. (A call of `give_up` would cost registers.)
DEVICE void await(u32 barrier, u32 parity) {
  if (ring_ready_for(barrier, parity)) return;
  const i64 start = clock64();
  while (!ring_ready_for(barrier, parity))
    if (clock64() - start > 4000000000ll) give_up();
}

// A place of the ring, and the parity of its round.
struct Turn {
  u32 slot = 0, parity = 0;
  DEVICE void on() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  DEVICE void skip(u32 count) {
    const u32 to = slot + count;
    slot = to % SLOTS, parity ^= to / SLOTS & 1;
  }
};

struct Shared {
  u32 ring, staging, full, empty;
  DEVICE Shared() {
    ring = (shared_address(shared_memory()) + 1023) & ~1023u;
    staging = ring + SLOTS * SLOT;
    full = staging + WORKERS * 4 * STAGED;
    empty = full + SLOTS * 8;
  }
};

// What block `rank` of a cluster copies: its rows, and a part of the weights for all of the cluster.
struct Fetcher {
  const Shared& s;
  const Call& call;
  const int rank;
  DEVICE void rows(const Tile& tile, int step, u32 slot) const {
    fetch_2d<false>(s.ring + slot * SLOT, &call.x, step * DEPTH, tile.row, s.full + slot * 8, 0);
  }
  DEVICE void weights(const Tile& tile, int step, u32 slot) const {
    constexpr int PART = BN / DOWN;
    constexpr u32 ALL = (1u << DOWN) - 1;
    const u32 target = s.ring + slot * SLOT + BM * 128 + rank * PART * 128, full = s.full + slot * 8;
    if (GATED) fetch_pairs<(DOWN > 1)>(target, &call.w, step * DEPTH, (tile.column + rank * PART / 2) / 8, full, ALL);
    else fetch_2d<(DOWN > 1)>(target, &call.w, step * DEPTH, tile.column + rank * PART, full, ALL);
  }
};

DEVICE void fetch(const Shared& s, const Call& call) {
  const int rank = (int)cluster_rank(), tiles = call.down * call.across;
  const Fetcher fetcher = {s, call, rank};
  int early = 0;
  if (CHAINED) {  // weights are there before the kernels ahead are done
    const Tile tile(call, (int)cluster_index(), rank);
    for (; early < min(SLOTS, call.steps); early++) ring_expect(s.full + early * 8, SLOT), fetcher.weights(tile, early, early);
    await_kernels_before();
    let_next_kernel_start();
  }
  Turn turn;
  for (int index = (int)cluster_index(); index < tiles; index += (int)cluster_count()) {
    const Tile tile(call, index, rank);
#pragma unroll 1
    for (int step = 0; step < call.steps; step++) {
      if (early > 0) {
        early--;
      } else {
        await(s.empty + turn.slot * 8, turn.parity ^ 1);
        ring_expect(s.full + turn.slot * 8, SLOT);
        fetcher.weights(tile, step, turn.slot);
      }
      fetcher.rows(tile, step, turn.slot);
      turn.on();
    }
  }
}

DEVICE u32 gated(u32 gate, u32 up) {
  return rounded(__fmul_rn(silu(low_half(gate)), low_half(up)), __fmul_rn(silu(high_half(gate)), high_half(up)));
}
// Of the eight columns `group` of y: the two of this thread, in row lane / 4 (`half` 0) or 8 below.
DEVICE u32 result(const float (&d)[BN / 2], int group, int half) {
  if (!GATED) return rounded(d[group * 4 + half * 2], d[group * 4 + half * 2 + 1]);
  const int at = group * 8 + half * 2;
  return gated(rounded(d[at], d[at + 1]), rounded(d[at + 4], d[at + 5]));
}

// A warp's 16 rows, by way of its own part of shared memory: so that it writes whole lines.
DEVICE void write(const float (&d)[BN / 2], u32 staging, const Call& call, int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < WIDE; first += CHUNK) {
    constexpr int REST = WIDE % CHUNK;
    const int width = first + CHUNK <= WIDE ? CHUNK : REST;
    const u32 at = staging + (lane % 16) * STRIDE + lane / 16 * 16;
#pragma unroll
    for (int group = first / 8; group < (first + width) / 8; group += 2) {
      const bool two = group + 1 < WIDE / 8;
      store_matrices(
          at + group * 16 - first * 2, result(d, group, 0), result(d, group, 1), two ? result(d, group + two, 0) : 0,
          two ? result(d, group + two, 1) : 0);
    }
    __syncwarp();
    const int pieces = width / 8;
#pragma unroll
    for (int piece = lane; piece < 16 * pieces; piece += 32) {
      const int r = piece / pieces, c = piece % pieces * 8;
      const uint4 x = shared128(staging + r * STRIDE + c * 2);
      if (row + r < call.rows && column + first + c < call.columns)
        *reinterpret_cast<uint4*>(call.out + (i64)(row + r) * call.columns + column + first + c) = x;
    }
    __syncwarp();
  }
}

// Who may write into place `slot` of this block hears that this warpgroup has read it.
DEVICE void release(const Shared& s, u32 slot) {
  const u32 thread = threadIdx.x % 128, barrier = s.empty + slot * 8;
  if (DOWN == 1) {
    if (thread == 0) ring_release(barrier, 1);
  } else if (thread < DOWN) {
    release_in(barrier, thread);
  }
}

DEVICE void work(const Shared& s, const Call& call, int worker) {
  const int rank = (int)cluster_rank(), tiles = call.down * call.across, team = worker / TEAM, member = worker % TEAM;
  const u32 staging = s.staging + (threadIdx.x / 32) * STAGED;
  Turn turn;
  turn.skip(team * call.steps);
  float d[TALL][BN / 2];
  for (int index = (int)cluster_index() + team * (int)cluster_count(); index < tiles; index += TEAMS * (int)cluster_count()) {
    const Tile tile(call, index, rank);
    // A parity tells neighbouring rounds of a place apart: so the team ahead has to be at its last place.
    if (TEAMS > 1 && index != (int)cluster_index()) meet(2 + team, 128 * WORKERS);
    Turn before = turn;
#pragma unroll 1
    for (int step = 0; step < call.steps; step++) {
      await(s.full + turn.slot * 8, turn.parity);
      if (TEAMS > 1 && step == call.steps - 1 && index + (int)cluster_count() < tiles) report(2 + (team + 1) % TEAMS, 128 * WORKERS);
      const u32 at = s.ring + turn.slot * SLOT;
      const u64 a = tile_at(at + member * ROWS_OF_TEAM_MEMBER * 128), b = tile_at(at + BM * 128);
      chain_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
        for (int tall = 0; tall < TALL; tall++) multiply_tiles(d[tall], a + tall * 512 + k * 2, b + k * 2, step > 0 || k > 0);
      chain_end();
      products_wait<1>();
      if (step > 0) release(s, before.slot);
      before = turn;
      turn.on();
    }
    products_wait<0>();
#pragma unroll
    for (int tall = 0; tall < TALL; tall++) settle(d[tall]);
    release(s, before.slot);
    turn.skip((TEAMS - 1) * call.steps);
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
      write(d[tall], staging, call, tile.row + member * ROWS_OF_TEAM_MEMBER + tall * 64 + threadIdx.x / 32 % 4 * 16, tile.column);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Call call) {
  const Shared s;
  if (threadIdx.x == 128 * WORKERS) announce(&call.w), announce(&call.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) ring_init(s.full + i * 8, 1), ring_init(s.empty + i * 8, TEAM * DOWN);
    ring_ready();
  }
  __syncwarp();
  if (DOWN > 1) cluster_meet();
  else __syncthreads();
  const int worker = warp_index() / 4;
  if (worker == WORKERS) {
    if (WORKERS == 2) give_registers<GIVEN>();
    if (threadIdx.x == 128 * WORKERS) fetch(s, call);
    __syncwarp();
  } else {
    if (WORKERS == 2) take_registers<TAKEN>();
    work(s, call, worker);
  }
  if (DOWN > 1) cluster_meet();
}
