"""`liushui verify`: passes on an honest model, fails on a kernel that looks at its neighbours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from liushui.config import Policy
from liushui.engine.verify import WAYS, verify
from liushui.errors import LiushuiError, ParameterError
from liushui.kernels.reference import TorchOps
from tests.cli.conftest import Done

FLAGS = ["--dtype", "float32", "--kv-cache-gib", "0.01", "--threads", "1", "--kernels", "native", "--max-tokens", "5"]


@pytest.fixture
def neighbourly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of the MLP that changes its last bit with the number of rows beside it."""
    honest = TorchOps.silu_mul
    monkeypatch.setattr(TorchOps, "silu_mul", lambda self, x: honest(self, x) * (1 + 1e-6 * (len(x) % 5)))


def test_an_honest_model_passes(liushui: Callable[..., Done], model: Path) -> None:
    done = liushui("verify", model, *FLAGS, "--json")
    assert done.code == 0
    matrix = json.loads(done.out)
    assert matrix["passed"] is True
    assert [row["way"] for row in matrix["ways"]] == [way.name for way in WAYS]
    assert [row["policy"] for row in matrix["ways"]] == [way.policy for way in WAYS]
    assert {row["policy"] for row in matrix["ways"]} == set(get_args(Policy))
    assert all(case["bitwise"] for row in matrix["ways"] for case in row["cases"].values())
    happened = {row["way"]: row["happened"] for row in matrix["ways"]}
    assert happened["batched"]["batch"] >= 12
    assert happened["chunked"]["chunks"] > 100
    assert happened["preempted"]["preemptions"] >= 3
    assert happened["prefix-cached"]["cached tokens"] > 1000
    assert "native kernels" in done.err


@pytest.mark.usefixtures("neighbourly")
def test_a_broken_kernel_fails(liushui: Callable[..., Done], model: Path) -> None:
    done = liushui("verify", model, *FLAGS, "--kernels", "torch")
    assert done.code == 1
    assert "DIFFERS" in done.out
    assert "continuous" in done.out
    assert "static" in done.out
    assert "FAILED" in done.out
    assert "instead of" in done.out
    assert "alone, again: the same bits" in done.err


def test_with_a_step_in_flight(model: Path) -> None:
    """As on a GPU: the next step is planned before the tokens of the last one are known."""
    from liushui import LLM

    llm = LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1)
    llm.engine.depth = 1
    verdicts = list(verify(llm, max_tokens=4))
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert len(verdicts) == len(WAYS)


def test_what_did_not_happen_proves_nothing(model: Path) -> None:
    from liushui import LLM
    from liushui.engine.verify import Way

    llm = LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1)
    way = Way(name="never preempted", proof="preemptions")
    (verdict,) = verify(llm, max_tokens=2, ways=[way])
    assert verdict.missing == "preemptions"
    assert not verdict.passed


def test_refusals(model: Path) -> None:
    from liushui import LLM, SamplingParams

    llm = LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1, max_num_seqs=2)
    with pytest.raises(ParameterError, match="max_num_seqs"):
        next(verify(llm))
    llm.generate("abc" * 20, SamplingParams(max_tokens=2), use_tqdm=False)
    with pytest.raises(LiushuiError, match="not answered yet"):
        next(verify(llm))
