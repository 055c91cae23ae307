"""Rung 6: continuous batching. After every step whoever is done leaves, and the next in the queue sits down.

There is no rectangle. A step is one row of tokens back to back: whole prompts of those who enter, one token of those
who are there. Each token brings its position and the place of its key and value in a pool of blocks; a block table
says which blocks are whose. So nothing is padded, nothing is truncated to fit, and only rows that are needed are
computed.
(The engine adds chunked prompts, a prefix cache, preemption, sampling: see `liushui.core.scheduler`.)
"""

from dataclasses import dataclass, field

import torch
from ladder import House, Meter, climb

from liushui.layers.batch import BatchTensors, KVCache

SEATS, BLOCK = 4, 16


@dataclass
class Guest:
    number: int
    ids: list[int]
    wanted: int
    kept: int = 0
    """Tokens whose keys and values are in the pool."""
    answer: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


def pack(seated: list[Guest], free: list[int]) -> BatchTensors:
    """What is not yet computed of everybody, back to back."""
    fed = [(guest.ids + guest.answer)[guest.kept :] for guest in seated]
    for guest, new in zip(seated, fed, strict=True):
        while len(guest.blocks) * BLOCK < guest.kept + len(new):
            guest.blocks.append(free.pop())
    places = [(g, g.kept + i) for g, new in zip(seated, fed, strict=True) for i in range(len(new))]
    width = max(len(guest.blocks) for guest in seated)
    starts = torch.tensor([0, *(len(new) for new in fed)]).cumsum(0)
    return BatchTensors(
        ids=torch.tensor([token for new in fed for token in new]),
        positions=torch.tensor([position for _, position in places]).int(),
        slots=torch.tensor([g.blocks[p // BLOCK] * BLOCK + p % BLOCK for g, p in places]).int(),
        query_start=starts.int(),
        seq_lens=torch.tensor([g.kept + len(new) for g, new in zip(seated, fed, strict=True)]).int(),
        block_table=torch.tensor([g.blocks + [0] * (width - len(g.blocks)) for g in seated]).int(),
    )


@torch.inference_mode()
def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter) -> list[list[int]]:
    """Greedy answers of exactly the wanted number of tokens."""
    guests = [Guest(number, ids, wanted) for number, (ids, wanted) in enumerate(requests)]
    queue, seated, free = list(guests), [], list(range(32))
    shape = house.packed.shape
    kv = KVCache.allocate(
        len(house.padded.attentions), len(free), shape.num_kv_heads, BLOCK, shape.head_dim, torch.float32
    )
    while queue or seated:
        while queue and len(seated) < SEATS:  # nobody waits for a table to fill
            seated.append(queue.pop(0))
        batch = pack(seated, free)
        hidden = house.packed.forward(kv, batch)  # [rows, H]
        logits = house.packed.logits(hidden[batch.query_start[1:].long() - 1])  # [sequences, vocab]
        meter.rows += len(batch.ids)
        for guest, token in zip(seated, logits.argmax(dim=-1).tolist(), strict=True):
            guest.kept = len(guest.ids) + len(guest.answer)
            guest.answer.append(token)
            meter.token(guest.number)
            if len(guest.answer) == guest.wanted:
                free += guest.blocks  # nobody waits for the slowest
        seated = [guest for guest in seated if len(guest.answer) < guest.wanted]
    return [guest.answer for guest in guests]


if __name__ == "__main__":
    climb("06_continuous_batching", "05_static_batching")
