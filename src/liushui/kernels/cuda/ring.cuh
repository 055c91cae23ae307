// The ring in shared memory: one warp fills it with weights, and with keys and values, as far ahead as there is room.
#pragma once
#include "layout.cuh"

DEVICE void ring_wait(u32 barrier, u32 parity, u32 site, u32 number) {
  spin([&] { return ring_ready_for(barrier, parity); }, site, number);
}

// A block's share of attention: splits of the keys of one KV head of one sequence, neighbours far apart on the chip.
struct Item {
  int row, head, split, length;
  DEVICE Item(const Step& step, int index)
      : row(index / KV_HEADS % ROWS), head(index % KV_HEADS), split(index / KV_HEADS / ROWS), length(step.lengths[row]) {}
  // A block takes its items from the last: split 0, which waits for the others, behind all that others wait for.
  DEVICE static int first(const Step& step) {
    const int count = ROWS * step.splits * KV_HEADS, least = (int)(blockIdx.x * 37 % gridDim.x);
    return least < count ? least + (count - 1 - least) / (int)gridDim.x * (int)gridDim.x : -1;
  }
  DEVICE bool exists() const { return split * SPAN < length || (split == 0 && length == 0); }
  DEVICE int low() const { return split * SPAN; }
  DEVICE int high() const { return min(length, low() + SPAN); }
  DEVICE int units() const { return (high() - low() + UNIT - 1) / UNIT; }
  DEVICE int splits() const { return max(1, (length + SPAN - 1) / SPAN); }
};

// -- the streaming warp

struct Stream {
  Shared& s;
  u32 next, lane;

  // A slot that expects `bytes`; `fetch` asks for them.
  template <class Fetch> DEVICE void fill(u32 bytes, Fetch fetch) {
    const u32 slot = next % SLOTS, full = shared_address(&s.full[slot]);
    ring_wait(shared_address(&s.empty[slot]), (next / SLOTS + 1) & 1, 1, next);
    if (lane == 0) ring_expect(full, bytes);
    __syncwarp();
    fetch(shared_address(s.ring[slot]), full);
    next++;
  }
  // The order in which `product` takes them: eight tiles, one for each warp, piece by piece; then the next eight.
  DEVICE void product(const u16* weight, int rows, int columns, int parts) {
    const int units = share(rows / 8);
#pragma unroll 1
    for (int first = 0; first < units; first += WARPS)
#pragma unroll 1
      for (int at = 0; at < columns; at += PIECE)
#pragma unroll 1
        for (int unit = first; unit < min(units, first + WARPS); unit++)
#pragma unroll 1
          for (int part = 0; part < parts; part++) {
            const u16* tile = weight + ((i64)(blockIdx.x + gridDim.x * unit) * 8 + (i64)part * rows) * columns + at;
            fill(8 * PIECE * 2, [&](u32 target, u32 full) {
              if (lane < 8) bulk_copy(target + lane * ROW_BYTES, tile + (i64)lane * columns, PIECE * 2, full);
            });
          }
  }
  // UNIT keys from position `start` on. Behind the last one anything may come: its reader does not look.
  DEVICE void keys(const Step& step, const Item& item, int layer, int start, const TensorMap* map) {
    const int* table = step.table + (i64)item.row * step.width;
    constexpr int BOXES = UNIT / BOX;
    fill(UNIT * DIM * 2, [&](u32 target, u32 full) {
      if (lane < BOXES * (DIM / 64)) {
        const int box = lane % BOXES, part = lane / BOXES, at = start + box * BOX;
        const int block = table[min(at, item.length - 1) / BLOCK];
        box_copy(target + part * UNIT * 128 + box * BOX * 128, map, part * 64,
                 layer * step.cache_rows + (block * KV_HEADS + item.head) * BLOCK + at % BLOCK, full);
      }
    });
  }
};

DEVICE void stream_weights(Shared& s, const Step& step) {
  Stream ring{s, 0, threadIdx.x % 32};
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = s.layers[i];
    ring.product(layer.qkv, QKV, HIDDEN, 1);
#pragma unroll 1
    for (int index = Item::first(step); index >= 0; index -= (int)gridDim.x) {
      const Item item(step, index);
      if (!item.exists()) continue;
#pragma unroll 1
      for (int unit = 0; unit < 2 * item.units(); unit++) {
        const bool second = unit >= item.units();
        ring.keys(step, item, i, item.low() + (second ? unit - item.units() : unit) * UNIT, second ? &step.values : &step.keys);
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
