"""Rung 4: truncation. One long prompt widens the rectangle for everybody, so frameworks cut it to `max_length`.

Cut on the left, for the end of a prompt is what is answered. A cut changes the question, so it must never happen
silently: here it is reported, and the answer to a cut prompt is that to the shortened prompt alone. (Packing, rung 6,
has no rectangle, and no need to cut.)
"""

from importlib import import_module

from ladder import House, Meter, climb, load

MAX_LENGTH = 12


def cut(requests: list[tuple[list[int], int]], limit: int) -> list[tuple[list[int], int]]:
    """Prompts of at most `limit` tokens: the last ones."""
    for number, (ids, _) in enumerate(requests):
        if len(ids) > limit:
            print(f"request {number}: {len(ids) - limit} of {len(ids)} prompt tokens are cut off on the left")
    return [(ids[-limit:], wanted) for ids, wanted in requests]


def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter, limit: int = 128) -> list[list[int]]:
    """As rung 3, in a rectangle at most `limit` wide before the first answer."""
    return import_module("03_padded_batch").generate(house, cut(requests, limit), meter)


def main() -> None:
    climb("04_truncation", "03_padded_batch")  # nothing is longer than that limit: the same tokens
    house, meter, alone = load(), Meter(), Meter()
    shorter = cut(house.requests, MAX_LENGTH)
    answers = generate(house, house.requests, meter, MAX_LENGTH)
    meter.report(f"cut at {MAX_LENGTH}", shorter)
    assert answers == import_module("02_kv_cache").generate(house, shorter, alone)
    print("same tokens as each shortened prompt alone: checked")


if __name__ == "__main__":
    main()
