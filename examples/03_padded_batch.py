"""Rung 3: several prompts in one pass. A step reads all weights once; then it had better serve many.

A tensor is a rectangle and prompts have different lengths, so short ones are filled up: on the left, for then the last
column holds the last token of every prompt. The filling must be hidden from attention (the mask) and must not count
(position ids: cumsum(mask) - 1). The logits are [B, vocab], one row per prompt: now dim=-1 matters, since dim=0 would
compare the prompts with each other.
"""

import torch
from ladder import House, Meter, climb

from liushui.models.padded import next_positions, pad, prompt_positions


def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter) -> list[list[int]]:
    """Greedy answers of exactly the wanted number of tokens; the rectangle stays until the last is done."""
    prompts, wanted = [ids for ids, _ in requests], [count for _, count in requests]
    answers: list[list[int]] = [[] for _ in requests]
    ids, mask = pad(prompts, 0)
    positions = prompt_positions(mask)
    kv = house.padded.new_kv(len(prompts), ids.shape[1] + max(wanted))
    for _ in range(max(wanted)):
        hidden = house.padded.forward(ids, mask, positions, kv)
        logits = house.padded.logits(hidden[:, -1])
        chosen = logits.argmax(dim=-1)  # [B]
        meter.rows += ids.numel()
        for row, token in enumerate(chosen.tolist()):
            if len(answers[row]) < wanted[row]:  # who is done computes on, for nobody
                answers[row].append(token)
                meter.token(row)
        ids, positions = chosen[:, None], next_positions(positions)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return answers


if __name__ == "__main__":
    climb("03_padded_batch", "02_kv_cache")
