"""`liushui bench serve`: load on a server, ours or another with OpenAI's endpoints."""

import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from liushui.bench.workload import Arrivals, from_jsonl, synthetic, workload
from liushui.cli.common import note
from liushui.errors import ParameterError

if TYPE_CHECKING:
    from liushui.bench.load import Seen

app = typer.Typer(help="Measure a server under load.", no_args_is_help=True, add_completion=False)


@app.callback()
def _bench() -> None:
    """Measure a server under load."""


def serve(
    base_url: Annotated[str, typer.Option(help="The server, with /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name there.")] = "smollm2",
    rate: Annotated[float, typer.Option(help="Requests a second; inf: all at once.")] = 1.0,
    arrivals: Annotated[Arrivals, typer.Option(help="How they come.")] = "poisson",
    burst: Annotated[int, typer.Option(min=1, help="With burst arrivals: so many together.")] = 10,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    dataset: Annotated[
        str, typer.Option(help="sharegpt-like, or a JSONL file of prompts or messages.")
    ] = "sharegpt-like",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; for rows of a file that name none.")] = 256,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which to ask.")] = "completions",
    ignore_eos: Annotated[bool, typer.Option(help="Answers of exactly max_tokens (vLLM's extension).")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    api_key: Annotated[str | None, typer.Option(help="Bearer token.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 600.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all numbers.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file for a picture.")] = None,
) -> None:
    """Send requests when they are due, whether or not earlier ones are answered, and report what clients see."""
    import asyncio  # here, so that other commands start without it

    from liushui.bench.load import Target, run
    from liushui.bench.report import Report, plot

    if dataset == "sharegpt-like":
        rng = random.Random(f"prompts {seed}")  # noqa: S311 (no secret)
        pairs: list[tuple[Any, int]] = [(p, min(limit, max_tokens)) for p, limit in synthetic(num_prompts, rng)]
    else:
        pairs = from_jsonl(Path(dataset), num_prompts, max_tokens)
    if endpoint == "completions" and any(not isinstance(prompt, str) for prompt, _ in pairs):
        raise ParameterError("--endpoint", "the dataset has messages; ask chat")
    asks = workload(pairs, arrivals, rate, seed, burst)
    extra = {"temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {})
    target = Target(base_url, model, api_key, endpoint == "chat", timeout, extra)
    settings = {
        "base_url": base_url,
        "model": model,
        "rate": rate if math.isfinite(rate) else "inf",
        "arrivals": arrivals,
        "num_prompts": num_prompts,
        "dataset": dataset,
        "endpoint": endpoint,
        "ignore_eos": ignore_eos,
        "seed": seed,
    }
    report = Report(settings, asyncio.run(run(asks, target, _Told(len(asks)))))
    for line in report.lines():
        print(line)
    if output is not None:
        output.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
        note(f"all numbers: {output}")
    if picture is not None:
        plot(report, picture)
        note(f"picture: {picture}")
    if (wrong := next((item.error for item in report.seen if not item.ok), None)) is not None:
        note(f"the first that failed: {wrong}")
    if not report.good:
        raise typer.Exit(1)


class _Told:
    """A line now and then."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def __call__(self, seen: "Seen") -> None:
        self._done += 1
        if self._done % max(1, self._total // 10) == 0:
            note(f"{self._done:,} of {self._total:,} ended")
