"""A long prompt arrives while answers stream: how long do the streams stop?

    python benchmarks/interference.py --target auto        # steps bounded in proportion to the step without prompts
    python benchmarks/interference.py --target 0           # bounded in tokens only
    python benchmarks/interference.py --target 120         # milliseconds

`--streams` answers run; after a while a prompt of `--prompt` tokens comes, nothing of it cached. Measured at the
reader, in this process, with the engine in its own: the time between two deltas of a stream. *Calm* are the gaps before
the prompt comes, *prefill* those that end between its arrival and its first token. All repeats are pooled for the
percentiles (p99 is not given from fewer than 100 gaps: then the longest stands for it); `ratio` is the median over the
repeats of (p99 during prefill / median when calm), its target 3.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from liushui.config import EngineConfig, ServingConfig
from liushui.core.request import SamplingParams
from liushui.engine.async_engine import AsyncEngine
from liushui.engine.inprocess import InProcessEngine
from liushui.engine.metrics import quantile
from liushui.engine.outputs import RequestOutput
from liushui.engine.process import ProcessEngine
from liushui.engine.serving import ServeRequest

ENOUGH = 100
"""Gaps for a p99."""


@dataclass
class Repeat:
    """One arrival. Seconds."""

    calm: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first_token: float = 0.0
    """Of the long prompt, from its arrival."""

    @property
    def ratio(self) -> float:
        return tail(self.prefill)[1] / statistics.median(self.calm)


def tail(gaps: list[float]) -> tuple[str, float]:
    """(name, seconds): the p99, or the longest of too few."""
    if len(gaps) < ENOUGH:
        return f"longest of {len(gaps)}", max(gaps)
    return "p99", quantile(gaps, 0.99) or 0.0


async def stream(engine: AsyncEngine, ids: list[int], length: int, times: list[float]) -> None:
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    async with await engine.submit(ServeRequest(prompt_token_ids=ids, params=params, stream=True)) as answers:
        async for news in answers:
            if isinstance(news, RequestOutput):
                assert news.error is None, news.error
            else:
                times += [time.perf_counter()] * bool(news.token_ids)


async def repeat(engine: AsyncEngine, options: argparse.Namespace, rng: random.Random) -> Repeat:
    def prompt(length: int) -> list[int]:
        return [rng.randrange(1000, engine.info.limits.vocab_size) for _ in range(length)]

    times: list[list[float]] = [[] for _ in range(options.streams)]
    streams = [asyncio.create_task(stream(engine, prompt(32), options.length, own)) for own in times]
    while min(map(len, times)) < options.calm:
        await asyncio.sleep(0.01)
    arrival = time.perf_counter()
    long: list[float] = []
    await stream(engine, prompt(options.prompt), 1, long)
    found = Repeat(first_token=long[0] - arrival)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    for own in times:
        pairs = list(pairwise(own[4:]))  # from the fifth on: all streams have joined
        found.calm += [after - before for before, after in pairs if after < arrival]
        found.prefill += [after - before for before, after in pairs if arrival <= after <= long[0]]
    return found


def show(target: str, found: list[Repeat], report: tuple[str, ...]) -> dict[str, Any]:
    calm, prefill = [[gap for one in found for gap in getattr(one, name)] for name in ("calm", "prefill")]
    name, worst = tail(prefill)
    return {
        "target_itl_ms": target,
        "repeats": len(found),
        "calm_median_ms": round(statistics.median(calm) * 1e3, 2),
        "calm_p99_ms": round(tail(calm)[1] * 1e3, 2),
        "prefill_gaps": len(prefill),
        "prefill_median_ms": round(statistics.median(prefill) * 1e3, 2),
        f"prefill_{name}_ms": round(worst * 1e3, 2),
        "ratio": round(statistics.median(one.ratio for one in found), 2),
        "ratios": [round(one.ratio, 2) for one in found],
        "first_token_of_the_prompt_s": round(statistics.median(one.first_token for one in found), 3),
        "engine": report,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    config = EngineConfig(model=options.model, device=options.device, threads=options.threads)
    target = None if options.target == "auto" else float(options.target)
    kind = InProcessEngine if options.in_process else ProcessEngine
    engine: AsyncEngine = kind(config, ServingConfig(target_itl_ms=target))
    await engine.start()
    try:
        rng, found = random.Random(options.seed), []
        for number in range(1 + options.repeats):
            one = await repeat(engine, options, rng)
            if number:  # the first one warms up
                found.append(one)
            summary = f"{one.ratio:.2f} times {statistics.median(one.calm) * 1e3:.1f} ms, {one.first_token:.2f} s"
            print(f"repeat {number}: {summary}", file=sys.stderr, flush=True)
        return show(options.target, found, engine.info.report)
    finally:
        await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--target", default="auto", help="auto, or milliseconds; 0: no bound in time")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a stream; they are cut off at the end")
    parser.add_argument("--calm", type=int, default=30, help="tokens of each stream before the prompt comes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--in-process", action="store_true", help="the engine on a thread of this process")
    parser.add_argument("--seed", type=int, default=1)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
