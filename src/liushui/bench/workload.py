"""What is asked, and when: prompts and arrivals. The same seed gives the same of both."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liushui.errors import ParameterError

Arrivals = Literal["poisson", "constant", "burst"]
_TEXT = (
    "time people water work world life hand part child eye woman place week case point company number "
    "group problem fact the of and to in is that for it as was with be by on not he his but at are this "
    "have from or had an they which one you were her all she there would their we him been has when who "
    "will more no if out so said what"
)
WORDS = _TEXT.split()
# Log-normal lengths in tokens: the middle and the spread of ShareGPT's first turns, as benchmarks commonly cut them.
PROMPT_LENGTHS, ANSWER_LENGTHS = (4.6, 1.1), (5.0, 0.8)
LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    at: float
    """Seconds after the start."""
    prompt: str | list[dict[str, Any]]
    """Text, or messages."""
    max_tokens: int


def arrivals(kind: Arrivals, rate: float, rng: random.Random, burst: int = 10) -> Iterator[float]:
    """Seconds after the start, endless. `rate`: requests a second (infinite: all at once); `burst`: that many together,
    at the same mean rate."""
    if not rate > 0:
        raise ParameterError("rate", f"must be positive, got {rate}")
    now, count = 0.0, 0
    while True:
        yield now
        count += 1
        if math.isinf(rate):
            continue
        if kind == "poisson":
            now += rng.expovariate(rate)
        elif kind == "constant":
            now = count / rate
        elif count % burst == 0:
            now += burst / rate


def synthetic(count: int, rng: random.Random, longest: int = LONGEST) -> list[tuple[str, int]]:
    """ShareGPT-like (prompt, max_tokens): many are short, a few are long; no two prompts begin alike."""
    made = []
    for number in range(count):
        size = _length(PROMPT_LENGTHS, rng, longest)
        words = " ".join(rng.choices(WORDS, k=max(1, int(size / 1.3))))  # about 1.3 tokens a word
        made.append((f"{number}. {words}", _length(ANSWER_LENGTHS, rng, longest)))
    return made


def _length(middle: tuple[float, float], rng: random.Random, longest: int) -> int:
    return max(4, min(longest, round(rng.lognormvariate(*middle))))


def from_jsonl(path: Path, count: int, default: int) -> list[tuple[Any, int]]:
    """Rows {"prompt": text} or {"messages": [...]}, each with "max_tokens" or not; repeated until there are `count`."""
    rows: list[tuple[Any, int]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError("dataset", f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row.get("messages") or row["prompt"]
            rows.append((prompt, int(row.get("max_tokens") or default)))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ParameterError("dataset", f"{path} line {number} has no prompt and no messages") from None
    if not rows:
        raise ParameterError("dataset", f"{path} has no rows")
    return [rows[i % len(rows)] for i in range(count)]


def workload(pairs: Sequence[tuple[Any, int]], kind: Arrivals, rate: float, seed: int, burst: int = 10) -> list[Ask]:
    """Prompts with their times."""
    times = arrivals(kind, rate, random.Random(f"arrivals {seed}"), burst)  # noqa: S311 (no secret)
    return [Ask(at, prompt, limit) for at, (prompt, limit) in zip(times, pairs, strict=False)]
