"""Rung 5: more requests than seats. Static batching seats a table, serves it until the slowest is done, then the next.

It blocks at the front: who comes while a table eats waits for all of it, though seats are idle. And it blocks at the
back: who is done stays, and the model computes rows for nobody. Compare with rung 6.
"""

from importlib import import_module

from ladder import House, Meter, climb

SEATS = 4


def generate(house: House, requests: list[tuple[list[int], int]], meter: Meter) -> list[list[int]]:
    """Rectangles of SEATS requests, one after the other."""
    rectangle = import_module("04_truncation").generate
    answers: list[list[int]] = []
    for start in range(0, len(requests), SEATS):
        table = Meter(start=meter.start)  # the clock runs from the moment all requests were there
        answers += rectangle(house, requests[start : start + SEATS], table)
        meter.rows += table.rows
        meter.tokens += table.tokens
        meter.first |= {start + row: seconds for row, seconds in table.first.items()}
    return answers


if __name__ == "__main__":
    climb("05_static_batching", "04_truncation")
