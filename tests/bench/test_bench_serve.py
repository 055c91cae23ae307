"""`liushui bench serve`: when requests leave, what is measured, what is not claimed."""

import asyncio
import json
import math
import random
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liushui.bench.load import Seen, Target, run
from liushui.bench.report import Report, Spread, needed
from liushui.bench.workload import Ask, arrivals, from_jsonl, synthetic, workload
from liushui.cli.main import app
from liushui.errors import ParameterError
from tests.engine.scripted import ScriptedExecutor, saying
from tests.support.serving import running, scripted

pytest.importorskip("aiohttp")
SAID = "Hello, 你好 👋!"


def times(kind: Any, rate: float, count: int, **more: Any) -> list[float]:
    return list(islice(arrivals(kind, rate, random.Random(1), **more), count))


def test_constant_arrivals() -> None:
    assert times("constant", 4.0, 4) == [0.0, 0.25, 0.5, 0.75]


def test_bursts_have_the_same_mean_rate() -> None:
    found = times("burst", 5.0, 30, burst=10)
    assert found == [0.0] * 10 + [2.0] * 10 + [4.0] * 10


def test_poisson_arrivals() -> None:
    """Mean and variance of the gaps are those of an exponential distribution."""
    found = times("poisson", 2.0, 20_000)
    gaps = [b - a for a, b in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    assert variance == pytest.approx(0.25, rel=0.1)


def test_all_at_once_and_no_rate() -> None:
    assert times("poisson", math.inf, 3) == [0.0, 0.0, 0.0]
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ParameterError, match="rate"):
            next(arrivals("poisson", rate, random.Random(1)))


def test_prompts_are_reproducible_and_begin_differently() -> None:
    first, again = (synthetic(50, random.Random(3)) for _ in range(2))
    assert first == again
    assert len({prompt[:4] for prompt, _ in first}) == 50
    lengths = sorted(len(prompt.split()) for prompt, _ in synthetic(500, random.Random(3)))
    assert lengths[450] > 3 * lengths[250] > 0  # a few are long
    asks = workload(first, "poisson", 3.0, 7)
    assert asks == workload(first, "poisson", 3.0, 7)
    assert [ask.at for ask in asks] != [ask.at for ask in workload(first, "poisson", 3.0, 8)]


def test_files_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    pairs = from_jsonl(path, 3, 9)
    assert pairs == [("a", 3), ([{"role": "user", "content": "b"}], 9), ("a", 3)]
    for text in ("{}", "[]", "x", ""):
        path.write_text(text)
        with pytest.raises(ParameterError, match="dataset"):
            from_jsonl(path, 3, 9)


def test_no_percentile_from_too_few_samples() -> None:
    assert [needed(q) for q in (0.5, 0.9, 0.99)] == [20, 100, 1000]
    values = [float(i) for i in range(999)]
    found = Spread.of(values).quantiles
    assert (found["p50"], found["p99"]) == (499.0, None)
    assert Spread.of([*values, 999.0]).quantiles["p99"] == pytest.approx(989.01)
    assert Spread.of(values[:19]).quantiles == {"p50": None, "p90": None, "p99": None}
    assert "p99 needs 1,000 samples" in Spread.of(values).line("x")
    assert Spread.of([]).line("x") == "x: nothing measured"


def test_times_count_from_when_a_request_was_due() -> None:
    """A client that is late does not make the server look quick."""
    seen = Seen(due=1.0, sent=1.5, first=2.0, last=3.0, status=200)
    assert (seen.ttft, seen.total) == (1.0, 2.0)
    lines = Report({}, [seen]).lines()
    assert any("client itself was 500 ms late" in line for line in lines)


def test_requests_leave_when_they_are_due_whoever_waits() -> None:
    """The server answers nobody before all have come: a closed loop would hang here."""
    came = []

    def hold(plan: Any) -> None:
        came.append(len(plan.items))

    executor = ScriptedExecutor(model=saying(SAID), on_step=hold)
    with running(scripted(executor)) as server:
        asks = [Ask(0.05 * i, "hi", 60) for i in range(8)]
        seen = asyncio.run(run(asks, Target(f"{server.url}/v1", "tiny")))
    assert [item.due for item in seen] == [ask.at for ask in asks]
    assert all(item.sent >= item.due for item in seen)
    assert all(item.ok and item.output_tokens == len(SAID.encode()) + 1 for item in seen)
    assert all(item.ttft is not None and item.total is not None and item.total >= item.ttft > 0 for item in seen)


def test_what_goes_wrong_is_counted() -> None:
    with running(scripted(ScriptedExecutor(model=saying(SAID)))) as server:
        good = Target(f"{server.url}/v1", "tiny", chat=False)
        bad = Target(f"{server.url}/v1", "other", chat=False)
        broken = Target("http://127.0.0.1:9/v1", "tiny")
        seen = [
            *asyncio.run(run([Ask(0.0, "a", 5)], good)),
            *asyncio.run(run([Ask(0.0, "a", 5)] * 2, bad)),
            *asyncio.run(run([Ask(0.0, "a", 5)], broken)),
        ]
    found = Report({}, seen).as_dict()
    assert (found["completed"], found["failed"]) == (1, 3)
    assert found["errors"]["HTTP 404"] == 2
    assert len(found["errors"]) == 2


def test_refusals_are_measured_apart() -> None:
    """A 503 has a time of its own; another error has none, and an answer none either."""
    executor = ScriptedExecutor(model=saying(SAID))
    with running(scripted(executor)) as server:
        target = Target(f"{server.url}/v1", "tiny", chat=False)
        good = asyncio.run(run([Ask(0.0, "a", 5)], target))
        server.call(drained(server.engine))
        full = asyncio.run(run([Ask(0.0, "a", 5)] * 25, target))
        lost = asyncio.run(run([Ask(0.0, "a", 5)], Target(f"{server.url}/v2", "tiny", chat=False)))
    assert all(item.refused is not None and item.refused > 0 for item in full)
    assert [item.refused for item in good + lost] == [None, None]
    found = Report({}, [*good, *full, *lost])
    assert found.errors() == {"HTTP 503": 25, "HTTP 404": 1}
    assert found.as_dict()["seconds_spread"]["refused"]["p50"] > 0
    (line,) = [line for line in found.lines() if line.startswith("refused with 503: mean")]
    assert "(25 samples)" in line
    assert not [line for line in Report({}, good).lines() if "503" in line]


async def drained(engine: Any) -> None:
    await engine.drain()


def test_the_command(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    with running(scripted(ScriptedExecutor(model=saying(SAID)))) as server:
        command = [
            "bench",
            "serve",
            "--base-url",
            f"{server.url}/v1",
            "-m",
            "tiny",
            "--rate",
            "inf",
            "--max-tokens",
            "60",
        ]
        done = CliRunner().invoke(app, [*command, "--num-prompts", "25", "--dataset", str(rows), "-o", str(out)])
        assert done.exit_code == 0, done.output
        synthetic_run = CliRunner().invoke(
            app,
            [*command, "--num-prompts", "5", "--endpoint", "chat", "--max-tokens", "4", "--picture", str(picture)],
        )
        assert synthetic_run.exit_code == 0, synthetic_run.output
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"]) == (25, 0)
    assert found["seconds_spread"]["ttft"]["p50"] > 0
    assert found["seconds_spread"]["ttft"]["p99"] is None
    assert found["output_tokens_per_second"] > 0
    assert "25 of 25 requests answered" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_an_answer_fails() -> None:
    with running(scripted()) as server:
        command = ["bench", "serve", "--base-url", f"{server.url}/v1", "--rate", "inf", "--num-prompts", "2"]
        done = CliRunner().invoke(app, [*command, "-m", "another"])
    assert done.exit_code == 1
    assert "0 of 2 requests answered" in done.output
    assert "the first that failed: HTTP 404: " in done.output
    assert "'another' is not served here; what is: tiny" in done.output


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "--dataset", str(tmp_path / "none")])
    assert done.exit_code == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "b"}]}\n')
    assert CliRunner().invoke(app, ["bench", "serve", "--dataset", str(rows)]).exit_code == 2
