"""On a GPU: a replayed step equals the same step run kernel by kernel, and nothing grows with the requests served."""

from typing import Any

import pytest
import torch

from liushui.core.blocks import BlockPool
from liushui.core.request import Request, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence
from tests.support import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PARAMS = [
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=1.0, logprobs=0),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=0),
]


def _runner() -> Any:
    settings = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 64, "max_num_batched_tokens": 512}
    return tiny.runner(tiny.oracle("qwen3", 3, hidden_size=64), kv_cache_gib=0.05, **settings)


def _prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_replay_equals_eager_for_every_bucket() -> None:
    replayed, eager = _runner(), _runner()
    eager.steps.graph_failure = "not in this test"
    for count in (1, 2, 3, 8, 9, 16, 17, 33, 48, 64):
        results = []
        for runner in (replayed, eager):
            driver = tiny.Driver(runner)
            for i in range(count):
                driver.add(f"{count}.{i}", _prompt(1 + i % 7, i), PARAMS[i % 3], seed=i)
            driver.step({f"{count}.{i}": 1 + i % 7 for i in range(count)})
            results.append([driver.step({f"{count}.{i}": 1 for i in range(count)}) for _ in range(4)])
        for got, expected in zip(*results, strict=True):
            assert got.tokens == expected.tokens
            assert got.logprobs == expected.logprobs
    assert replayed.steps.graphs
    assert not eager.steps.graphs


def _serve(runner: Any, count: int) -> None:
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": runner.max_model_len}
    scheduler = Scheduler(BlockPool(runner.num_blocks, runner.block_size), **options)
    for i in range(count):
        request = Request(f"r{i}", tuple(_prompt(1 + i * 7 % 90, i)), PARAMS[i % 3], i, 1 + i * 5 % 30)
        scheduler.add(Sequence(request))
    flights = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        if plan is not None:
            flights.append((plan, runner.execute(plan)))
        if flights and (plan is None or len(flights) > 1):
            done, pending = flights.pop(0)
            scheduler.update(done, pending.result().tokens)
    scheduler.check()
    assert scheduler.pool.num_free == runner.num_blocks


def test_a_thousand_requests_leave_nothing_behind() -> None:
    runner = _runner()
    _serve(runner, 500)  # captures the graphs of these shapes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    _serve(runner, 500)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20
    assert len(runner.states) <= 64


def test_captures_go_on_when_no_graph_is_left() -> None:
    runner = _runner()
    _serve(runner, 40)
    assert runner.steps.graphs
    runner.steps.graphs.clear()  # their memory pool ends with them
    _serve(runner, 40)
    assert runner.steps.graphs
    assert runner.steps.graph_failure is None


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that asks the host in between: refused by the capture, answered all the same."""
    asking, quiet = _runner(), _runner()
    real = asking.steps.forward

    def forward(kv: Any, batch: Any) -> torch.Tensor:
        hidden = real(kv, batch)
        hidden.sum().item()
        return hidden

    monkeypatch.setattr(asking.steps, "forward", forward)
    results = []
    for runner in (asking, quiet):
        runner.steps.finish()  # what is tried behind the first steps begins them anew
        driver = tiny.Driver(runner)
        driver.add("a", _prompt(9, 1), PARAMS[0])
        driver.step({"a": 9})
        results.append([driver.step({"a": 1}).tokens for _ in range(6)])
    assert results[0] == results[1]
    assert asking.steps.graph_failure
    assert not asking.steps.graphs
    assert quiet.steps.graphs
