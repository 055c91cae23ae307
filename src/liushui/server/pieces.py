"""JSON in pieces: a long answer is neither made nor written at once, so that meanwhile others are served.

    {"choices": [{"logprobs": {"content": Rows(...)}}], ...}  ->  b'{"choices":[{"logprobs":{"content":[{"token":', ...

What is long in an answer are its log-probabilities: they stand in it as `Rows`, which are made when their turn comes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic_core import to_json

from liushui.engine.ticket import tokens_together

PIECE = 16 * 1024
"""Bytes that are worth a piece of their own."""


class Rows:
    """A JSON array that is made while it is written, once: its elements, a few at a time."""

    def __init__(self, made: Iterable[Sequence[Any]]) -> None:
        self.made = made


def parts(length: int, top: int) -> Iterator[slice]:
    """`length` tokens with `top` log-probabilities each, cut into parts of what may be written together."""
    size = tokens_together(top)
    for start in range(0, length, size):
        yield slice(start, start + size)


def pieces(value: Any) -> Iterator[bytes]:
    """The JSON of `value` in pieces of about `PIECE` bytes: together what `to_json` would give with lists for `Rows`.
    These may stand in dictionaries, and in lists of dictionaries."""
    waiting = bytearray()
    for part in _walk(value):
        waiting += part
        if len(waiting) >= PIECE:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _walk(value: Any) -> Iterator[bytes]:
    match value:
        case Rows():
            yield b"["
            separator = b""
            for made in value.made:
                if made:
                    yield separator + to_json(made)[1:-1]
                    separator = b","
            yield b"]"
        case dict():
            opening = b"{"
            for key, item in value.items():
                yield opening + to_json(key) + b":"
                yield from _walk(item)
                opening = b","
            yield b"}" if value else b"{}"
        case [dict(), *_]:
            opening = b"["
            for item in value:
                yield opening
                yield from _walk(item)
                opening = b","
            yield b"]"
        case _:
            yield to_json(value)
