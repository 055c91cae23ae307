// The ring in shared memory: one warp fills it with weights, and with keys and values, as far ahead as there is room.
#pragma once
#include "layout.cuh"

// Tenants on their way to a block at once. More would only wait in the memory system, and mail behind them (measured on an
// H100: 8 and 3 were best or nearly so from 128 to 3,400 KB of weights a block and layer).
constexpr u32 FLYING = 8, FLYING_WHILE_WAITING = 3;

DEVICE void ring_wait(u32 barrier, u32 parity, u32 site, u32 number) {
  spin([&] { return ring_ready_for(barrier, parity); }, site, number);
}

// A block's share of attention: splits of the keys of one KV head of one sequence, neighbours far apart on the chip.
struct Item {
  int row, head, split, length;
  DEVICE Item(const Step& step, int index)
      : row(index / KV_HEADS % live(step)),
        head(index % KV_HEADS),
        split(index / KV_HEADS / live(step)),
        length(step.lengths[row]) {}
  // A block takes its items from the last: split 0, which waits for the others, behind all that others wait for.
  DEVICE static int first(const Step& step) {
    const int count = live(step) * step.splits * KV_HEADS, least = (int)(blockIdx.x * 37 % gridDim.x);
    return least < count ? least + (count - 1 - least) / (int)gridDim.x * (int)gridDim.x : -1;
  }
  DEVICE bool exists() const { return split * SPAN < length || (split == 0 && length == 0); }
  DEVICE int low() const { return split * SPAN; }
  DEVICE int high() const { return min(length, low() + SPAN); }
  DEVICE int units() const { return (high() - low() + UNIT - 1) / UNIT; }
  DEVICE int splits() const { return max(1, (length + SPAN - 1) / SPAN); }
};

// Whether tiles side by side have room from `slot` on. wgmma reads eight of them, unless there is but one.
DEVICE bool fits(u32 slot, int tiles) {
  return slot + tiles <= SLOTS && (tiles == 1 || slot + 8 <= SHARED_BYTES / SLOT_BYTES);
}

// -- the streaming warp

struct Stream {
  Shared& s;
  u32 slot, round;
  int lane;

  // A slot that expects `bytes`; `fetch` asks for them, in one thread: a copy that each lane asks for takes 50 cycles a
  // lane, which was the limit of a layer.
  template <class Fetch> DEVICE void fill(u32 bytes, Fetch fetch) {
    const u32 full = shared_address(&s.full[slot]);
    ring_wait(shared_address(&s.empty[slot]), round + 1 & 1, 1, slot);
    const u32 most = *static_cast<volatile u32*>(&s.waiting) ? FLYING_WHILE_WAITING : FLYING;
    const bool wraps = slot < most;
    if (!wraps || round > 0)
      ring_wait(shared_address(&s.full[wraps ? slot + SLOTS - most : slot - most]), (wraps ? round + 1 : round) & 1, 1, slot);
    if (elected()) {
      ring_expect(full, bytes);
      fetch(shared_address(s.ring[slot]), full);
    }
    __syncwarp();
    if (++slot == SLOTS) slot = 0, round++;
  }
  // The order in which `product` takes them: groups of MOST_TILES, piece by piece. A group's tiles of a piece lie side by
  // side: what is left at the end of the ring is passed empty.
  DEVICE void product(const TensorMap* map, int rows, int columns, int parts) {
    const int units = share(rows / 8), most = MOST_TILES / parts;
#pragma unroll 1
    for (int first = 0; first < units; first += most)
#pragma unroll 1
      for (int at = 0; at < columns; at += PIECE) {
        const int last = min(units, first + most);
        if (!fits(slot, (last - first) * parts))
          while (slot != 0) fill(0, [](u32, u32) {});
        int row = (int)(blockIdx.x + gridDim.x * first) * 8;
#pragma unroll 1
        for (int unit = first; unit < last; unit++, row += (int)gridDim.x * 8)
#pragma unroll 1
          for (int part = 0; part < parts; part++)
            fill(TILE_BYTES, [&](u32 target, u32 full) { tile_copy(target, map, row + part * rows, at / 64, full); });
      }
  }
  // UNIT keys from position `start` on, of blocks that the lanes hold. Behind the last one anything may come: its reader
  // does not look.
  DEVICE void keys(const Step& step, const Item& item, u32 block, int layer, int start, const TensorMap* map) {
    int rows[UNIT / BOX];
#pragma unroll
    for (int box = 0; box < UNIT / BOX; box++) {
      const int at = min(start + box * BOX, (item.length - 1) / BOX * BOX);
      const u32 held = __shfl_sync(0xFFFFFFFFu, block, (at - item.low()) / BLOCK);
      rows[box] = layer * step.cache_rows + (held * KV_HEADS + item.head) * BLOCK + at % BLOCK;
    }
    fill(UNIT * DIM * 2, [&](u32 target, u32 full) {
#pragma unroll
      for (int box = 0; box < UNIT / BOX; box++)
#pragma unroll
        for (int part = 0; part < DIM / 64; part++)
          box_copy(target + part * UNIT * 128 + box * BOX * 128, map, part * 64, rows[box], full);
    });
  }
  DEVICE u32 table(const Step& step, const Item& item) const {
    return step.table[(i64)item.row * step.width + min(item.low() / BLOCK + lane, max(item.length - 1, 0) / BLOCK)];
  }
};

DEVICE void stream_weights(Shared& s, const Step& step) {
  Stream ring{s, 0, 0, static_cast<int>(threadIdx.x % 32)};
  const int mine = Item::first(step);
  const Item item(step, max(mine, 0));
  const u32 known = ring.table(step, item);  // the table does not change: asked for once
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = s.layers[i];
    if (ring.lane < 4) announce((&s.layers[min(i + 1, LAYERS - 1)].qkv)[ring.lane]);
    ring.product(layer.qkv, QKV, HIDDEN, 1);
#pragma unroll 1
    for (int index = mine; index >= 0; index -= (int)gridDim.x) {
      const Item next(step, index);
      if (!next.exists()) continue;
      const u32 held = index == mine ? known : ring.table(step, next);
#pragma unroll 1
      for (int unit = 0; unit < 2 * next.units(); unit++) {
        const bool second = unit >= next.units();
        const int start = next.low() + (second ? unit - next.units() : unit) * UNIT;
        ring.keys(step, next, held, i, start, second ? &step.values : &step.keys);
      }
    }
#pragma unroll 1
    for (int part = 0; part < 3; part++)
      ring.product(part == 0 ? layer.output : part == 1 ? layer.gate_up : layer.down, part == 1 ? INNER : HIDDEN,
                   part == 0 ? QUERY : part == 1 ? HIDDEN : INNER, part == 1 ? 2 : 1);
  }
}

// -- the computing warps

// A tenant of the ring: its slot, and how often the ring has gone round (the last bit counts).
struct Place {
  u32 slot, round;
  // `count` tenants on, at most SLOTS.
  DEVICE Place on(u32 count) const {
    const u32 to = slot + count;
    return to < SLOTS ? Place{to, round} : Place{to - SLOTS, round + 1};
  }
  DEVICE Place far_on(u32 count) const { return {(slot + count) % SLOTS, round + (slot + count) / SLOTS}; }
};

// The tenant has arrived. A parity tells neighbouring rounds of a slot apart: so its last tenant must be gone, too.
DEVICE bool arrived(Shared& s, Place at) {
  const bool gone = ring_ready_for(shared_address(&s.empty[at.slot]), at.round + 1 & 1);
  return ring_ready_for(shared_address(&s.full[at.slot]), at.round & 1) & gone;
}
DEVICE u32 await_slot(Shared& s, Place at) {
  spin([&] { return arrived(s, at); }, 2, at.slot);
  return shared_address(s.ring[at.slot]);
}
// `count` tenants from `at` on, at most 32: each by a lane.
DEVICE void await_slots(Shared& s, Place at, int count) {
  const int lane = threadIdx.x % 32;
  if (lane < count) {
    const Place mine = at.on(lane);
    spin([&] { return arrived(s, mine); }, 3, mine.slot);
  }
  __syncwarp();
}
// A slot is free again when WARPS are counted.
DEVICE void release_slot(Shared& s, Place at, u32 count) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring_release(shared_address(&s.empty[at.slot]), count);
}
DEVICE void release_slots(Shared& s, Place at, int tenants, u32 count) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (lane < tenants) ring_release(shared_address(&s.empty[at.on(lane).slot]), count);
}
