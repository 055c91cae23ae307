"""Rung 2: keep the keys and values. What a token looked like to later ones does not change, so it is kept.

The prompt is fed once; after that each step feeds one token. That token comes alone, so nothing in the input shows that
it is the twelfth: its position must be given. Without it the model would take every new token for the first of a text
(`liushui explain --without-positions` shows what becomes of the answer).
"""

import torch
from ladder import House, Meter, climb


def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter) -> list[list[int]]:
    """Greedy answers of exactly the wanted number of tokens."""
    answers: list[list[int]] = []
    for number, (prompt, wanted) in enumerate(requests):
        kv = house.padded.new_kv(1, len(prompt) + wanted)
        answer: list[int] = []
        ids = torch.tensor([prompt])  # [1, T] first, [1, 1] from then on
        positions = torch.arange(len(prompt))[None]
        while True:
            seen = torch.ones(1, kv.columns + ids.shape[1])
            hidden = house.padded.forward(ids, seen, positions, kv)
            token = house.padded.logits(hidden[:, -1]).argmax(dim=-1)
            answer.append(int(token))
            meter.rows += ids.numel()
            meter.token(number)
            if len(answer) == wanted:
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
        answers.append(answer)
    return answers


if __name__ == "__main__":
    climb("02_kv_cache", "01_one_sequence")
