"""On a Hopper GPU: a step of one row in one kernel has the bits of the same step kernel by kernel."""

import threading
from itertools import count
from typing import Any

import pytest
import torch

from liushui.core.request import SamplingParams
from liushui.kernels.cuda import CudaUnavailableError
from liushui.layers import one_row
from tests.support import tiny

_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HOPPER, reason="needs a Hopper GPU")]
PARAMS = SamplingParams(temperature=0.9, logprobs=4)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}


@pytest.fixture(autouse=True)
def _one_kernel_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = count()
    monkeypatch.setattr(one_row, "_milliseconds", lambda run: next(times))


def _runner(family: str = "qwen3", **changes: Any) -> Any:
    sizes = {"num_key_value_heads": 4, "max_position_embeddings": 2048, **SIZES, **changes}
    settings = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 4, "max_num_batched_tokens": 2048}
    runner = tiny.runner(tiny.oracle(family, 3, **sizes), kv_cache_gib=0.1, max_model_len=2048, **settings)
    runner.steps.settle()
    return runner


def _answers(runner: Any, length: int) -> list[Any]:
    """Tokens and log-probabilities of a prompt and of steps kernel by kernel, captured, and replayed."""
    prompt = torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    driver = tiny.Driver(runner)
    driver.add(f"{length}", prompt, PARAMS, seed=length)
    steps = [driver.step({f"{length}": length})] + [driver.step({f"{length}": 1}) for _ in range(5)]
    return [(step.tokens, step.logprobs) for step in steps]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3", {}), ("llama", {"num_key_value_heads": 2}), ("llama", {"num_attention_heads": 4, "head_dim": 128})],
)
def test_one_kernel_has_the_bits_of_many(family: str, changes: dict[str, Any]) -> None:
    whole, parts = _runner(family, **changes), _runner(family, **changes)
    assert whole.steps.one_row.decoder is not None, whole.notes
    parts.steps.one_row.decoder = None
    for length in (1, 2, 15, 64, 65, 509, 700, 1030):
        assert _answers(whole, length) == _answers(parts, length)
    assert whole.steps.one_row.note.startswith("steps of one row: one kernel (")


def test_the_slower_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = count(0, -1)
    monkeypatch.setattr(one_row, "_milliseconds", lambda run: next(times))
    runner = _runner()
    assert runner.steps.one_row.decoder is None
    assert runner.steps.one_row.note.startswith("steps of one row: kernel by kernel (")


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = one_row.OneRow.__call__

    def off(self: Any, x: torch.Tensor, batch: Any) -> bool:
        done = real(self, x, batch)
        if done:
            x.view(torch.int16)[0, 5] += 1
        return done

    monkeypatch.setattr(one_row.OneRow, "__call__", off)
    runner = _runner()
    assert runner.steps.one_row.decoder is None
    assert "other bits" in runner.steps.one_row.note


def test_it_is_tried_between_two_steps_of_a_sequence() -> None:
    runner, parts = _runner(), _runner()
    for each in (runner, parts):
        each.steps.one_row.decoder = None
    ready = threading.Event()
    runner.steps.settle_once(ready)
    results = []
    for each in (runner, parts):
        driver = tiny.Driver(each)
        driver.add("a", torch.arange(3, 103).tolist(), PARAMS)
        steps = [driver.step({"a": 100})] + [driver.step({"a": 1}) for _ in range(4)]
        assert each.steps.one_row.decoder is None
        ready.set()
        steps += [driver.step({"a": 1}) for _ in range(4)]
        results.append([(step.tokens, step.logprobs) for step in steps])
    assert results[0] == results[1]
    assert runner.steps.one_row.decoder is not None


def test_a_refused_launch_goes_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, parts = _runner(), _runner()
    parts.steps.one_row.decoder = None

    def refused(*_: Any) -> None:
        raise CudaUnavailableError("too large")

    monkeypatch.setattr(runner.steps.one_row.decoder.kernel, "launch", refused)
    assert _answers(runner, 9) == _answers(parts, 9)
    assert runner.steps.one_row.decoder is None
