"""What the six steps of the ladder share: the model, the requests, and a meter.

    01_one_sequence          no cache: every step computes everything again
    02_kv_cache              keys and values are kept; a step feeds one token, and must say where it stands
    03_padded_batch          several prompts in one rectangle: padding, a mask, position ids
    04_truncation            what is too long for the rectangle is cut, and says so
    05_static_batching       more requests than seats: tables sit down and rise together
    06_continuous_batching   the running banquet: no rectangle, and nobody waits for anybody

Run any of them: `python examples/03_padded_batch.py [MODEL]`. Each checks that its tokens are those of the one before.
"""

import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

REQUESTS = [  # (prompt, tokens wanted)
    ("The capital of France is", 4),
    ("Once upon a time, there was a little", 14),
    ("Water boils at a temperature of", 3),
    ("The three primary colours are", 6),
    ("1, 2, 3, 4, 5,", 12),
    ("Roses are red, violets are", 2),
    ("In a galaxy far, far away, there lived a very old and very wise robot who had", 8),
    ("The opposite of hot is", 3),
]


@dataclass
class House:
    """A loaded model: `padded` takes rectangles, `packed` rows back to back."""

    padded: Any
    packed: Any
    requests: list[tuple[list[int], int]]
    """(token ids, tokens wanted)."""
    decode: Any


def load(model: str | None = None) -> House:
    """The model named on the command line, or the default one, in float32."""
    from liushui import EngineConfig, loading
    from liushui.engine.tokenizer import Tokenizer
    from liushui.models.padded import PaddedModel
    from liushui.runner.runner import Runner

    name = model or (sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    checkpoint = loading.open_checkpoint(loading.resolve(name))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    config = EngineConfig(model=name, device="cpu", dtype="float32", kv_cache_gib=0.01, max_model_len=128, threads=1)
    packed = Runner.load(config, checkpoint).model
    requests = [(tokenizer.encode(text), wanted) for text, wanted in REQUESTS]
    return House(PaddedModel(packed), packed, requests, tokenizer.decode)


@dataclass
class Meter:
    """Time, tokens, and rows (tokens that went through the model)."""

    start: float = field(default_factory=perf_counter)
    first: dict[int, float] = field(default_factory=dict)
    """Request -> seconds until its first token."""
    tokens: int = 0
    rows: int = 0

    def token(self, request: int) -> None:
        """The next token of a request is known."""
        self.tokens += 1
        self.first.setdefault(request, perf_counter() - self.start)

    def report(self, name: str, requests: list[tuple[list[int], int]]) -> None:
        seconds = perf_counter() - self.start
        needed = sum(len(ids) + wanted - 1 for ids, wanted in requests)  # the last token is never fed
        waits = sum(self.first.values()) / len(self.first)
        print(f"{name:<24} {self.tokens / seconds:6.1f} tokens/s   first token after {waits:5.2f} s on average")
        print(f"{'':<24} {self.rows} rows computed, {needed} needed: {1 - needed / self.rows:.0%} wasted")


def climb(rung: str, previous: str | None) -> None:
    """Run a rung and the one before it, show both, and check that their tokens are the same."""
    house = load()
    answers = {}
    for name in filter(None, (previous, rung)):
        meter = Meter()
        answers[name] = import_module(name).generate(house, house.requests, meter)
        meter.report(name, house.requests)
    for (ids, _), answer in zip(house.requests, answers[rung], strict=True):
        print(f"  {house.decode(ids)!r} -> {house.decode(answer)!r}")
    if previous:
        assert answers[rung] == answers[previous], f"{rung} chose other tokens than {previous}"
        print(f"same tokens as {previous}: checked")
