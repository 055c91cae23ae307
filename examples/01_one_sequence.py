"""Rung 1: one sequence at a time, and no memory. Every step computes the whole text again, to learn one token more.

The model gives a row of numbers (logits) for every token of the text: [1, T, vocab]. The last row is about what comes
next. `argmax(dim=-1)` asks within a row, over the vocabulary; with one row any other way would do, with two it would
not. So it is said from the start.
"""

import torch
from ladder import House, Meter, climb


def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter) -> list[list[int]]:
    """Greedy answers of exactly the wanted number of tokens."""
    answers: list[list[int]] = []
    for number, (prompt, wanted) in enumerate(requests):
        answer: list[int] = []
        while len(answer) < wanted:
            ids = torch.tensor([prompt + answer])  # [1, T], T grows
            positions = torch.arange(ids.shape[1])[None]
            nothing_kept = house.padded.new_kv(1, ids.shape[1])
            hidden = house.padded.forward(ids, torch.ones_like(ids), positions, nothing_kept)
            logits = house.padded.logits(hidden[:, -1])  # [1, vocab]
            answer.append(int(logits.argmax(dim=-1)))
            meter.rows += ids.numel()
            meter.token(number)
        answers.append(answer)
    return answers


if __name__ == "__main__":
    climb("01_one_sequence", None)
