"""A full queue: how long does a refused request wait for its 503?

    python benchmarks/overload.py                      # SmolLM2, --threads 1, 1,200 refused requests in 30 s
    python benchmarks/overload.py --threads 2 --words 4000

A server of its own process (and its engine's), as `liushui serve` starts it. Streams that do not end meanwhile take all
seats and all places in the queue, and are read to the last byte; then requests come at a constant rate, each with a
prompt of `--words` words, whether or not earlier ones are answered. Every one must be refused with 503 and Retry-After.
Time is the client's: from when the request was due until the refusal is read to its end. The client shares the
machine with the server. p99 is not given from fewer than 1,000.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liushui.bench.load import Seen, Target, run
from liushui.bench.report import Report
from liushui.bench.workload import Ask


@contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """Its address, while it runs."""
    command = [sys.executable, "-m", "liushui.cli.main", "serve", options.model, "--port", "0"]
    command += ["--threads", str(options.threads), "--max-num-seqs", str(options.seats)]
    command += ["--max-queue-requests", str(options.queue)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file)
        try:
            while not (found := [line for line in log.read_text().splitlines() if line.startswith("listening on ")]):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield found[0].split()[2]
        finally:
            process.terminate()
            time.sleep(0.5)
            process.terminate()  # it drains; a second signal ends it at once
            process.wait()


async def measure(options: argparse.Namespace, address: str) -> dict[str, Any]:
    import aiohttp

    target = Target(f"{address}/v1", options.model, chat=False, extra={"ignore_eos": True})
    fillers = [Ask(0.0, f"{number} words", options.length) for number in range(options.seats + options.queue)]
    filling = asyncio.create_task(run(fillers, target))
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{address}/debug/requests") as response:
                found = (await response.json())["requests"]
            running = sum(one["state"] == "running" for one in found)
            if (len(found), running) == (len(fillers), options.seats):
                break
            assert not filling.done(), "the streams ended before they were all there"
            await asyncio.sleep(0.1)
        prompt = "word " * options.words
        asks = [Ask(number / options.rate, prompt, 16) for number in range(options.requests)]
        seen = await run(asks, target)
        async with session.get(f"{address}/metrics") as response:
            lines = (await response.text()).splitlines()
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    return show(options, seen, lines)


def show(options: argparse.Namespace, seen: list[Seen], lines: list[str]) -> dict[str, Any]:
    wrong = [one.error for one in seen if one.status != 503]
    assert not wrong, f"{len(wrong)} of {len(seen)} were not refused: {wrong[:3]}"
    spread = Report({}, seen).spreads()
    refused, late = spread["refused"], spread["client_lateness"]
    counted = [line for line in lines if line.startswith("liushui_requests_refused_total")]
    return {
        **{name: getattr(options, name) for name in ("model", "threads", "seats", "queue", "rate", "words")},
        "refused": refused.samples,
        "counted_by_the_server": counted,
        "mean_ms": _ms(refused.mean),
        **{f"{name}_ms": _ms(value) for name, value in refused.quantiles.items()},
        "longest_ms": _ms(max(one.refused for one in seen if one.refused is not None)),
        "client_late_mean_ms": _ms(late.mean),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the client and the server need one too")
    parser.add_argument("--seats", type=int, default=8, help="streams that run")
    parser.add_argument("--queue", type=int, default=8, help="streams that wait")
    parser.add_argument("--length", type=int, default=4000, help="tokens of a stream; they are cut off at the end")
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=40.0, help="a second")
    parser.add_argument("--words", type=int, default=1000, help="of a refused prompt")
    options = parser.parse_args()
    with server(options) as address:
        print(json.dumps(asyncio.run(measure(options, address)), indent=2))


if __name__ == "__main__":
    main()
