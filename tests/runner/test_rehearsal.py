"""Kernels compiled ahead: what the first steps launch has been met before, with the same constants."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.kernels.triton.common import Kernel
from liushui.models.registry import sizes
from liushui.runner import rehearsal
from liushui.runner.rehearsal import Rehearsal, distinct, shapes
from liushui.runner.staging import StepShape
from tests.kernels.triton_support import COMPILED, DEVICE, MARK
from tests.support import tiny

pytestmark = MARK
SMALL = {"num_hidden_layers": 2, "vocab_size": 67}
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, str]]:
    """(kernel, whether it was only compiled, its constants) of every launch from here on."""
    seen: list[tuple[str, bool, str]] = []
    real = Kernel.__getitem__

    def watched(self: Kernel, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            seen.append((self.function.__name__, arguments[0].is_meta, str(sorted(constants.items()))))
            return real(self, grid)(*arguments, **constants) if COMPILED or not arguments[0].is_meta else None

        return launch

    monkeypatch.setattr(Kernel, "__getitem__", watched)
    return seen


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma3", "olmo2"] if COMPILED else ["qwen3", "gpt2"])
def test_first_steps_launch_what_was_rehearsed(family: str, launched: list[tuple[str, bool, str]]) -> None:
    model = tiny.oracle(family, 3, **SMALL)
    device = {"device": "cuda"} if COMPILED else {"device": "cpu", "kernels": "triton"}
    settings = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 256}
    checkpoint = tiny.checkpoint(model)
    config = EngineConfig(**settings).settled(True)
    played = Rehearsal(checkpoint, sizes(checkpoint.config), config, torch.float32, DEVICE, 256)
    assert played.finish().startswith("kernels of the first steps")
    ready = {(name, constants) for name, compiled, constants in launched if compiled}
    assert ready
    assert all(compiled for _, compiled, _ in launched)
    driver = tiny.Driver(tiny.runner(model, **(device | settings)))
    driver.add("a", [5, 6, 7, 8, 9], GREEDY)
    driver.step({"a": 5})
    driver.step({"a": 1})
    assert {(name, constants) for name, compiled, constants in launched if not compiled} <= ready


@pytest.mark.skipif(not COMPILED, reason="the interpreter has all kernels at once")
def test_more_is_compiled_once_the_first_step_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_PATIENCE", 60.0)
    checkpoint = tiny.checkpoint(tiny.oracle("qwen3", 3, **SMALL))
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=256, block_size=16).settled(True)
    played = Rehearsal(checkpoint, sizes(checkpoint.config), config, torch.float32, DEVICE, 256)
    assert played.first().startswith("kernels of the first steps")
    assert not played.finished.wait(0.2)
    played.begun.set()
    assert played.finished.wait(60)


def test_a_model_that_needs_values_is_said_to_compile_later() -> None:
    checkpoint = tiny.checkpoint(tiny.oracle("mixtral", 3, **SMALL))
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, block_size=16).settled(True)
    played = Rehearsal(checkpoint, sizes(checkpoint.config), config, torch.float32, DEVICE, 64)
    assert played.finish().startswith("kernels are compiled at first use")


def test_layers_of_one_kind_are_rehearsed_once() -> None:
    runner = tiny.runner(tiny.oracle("gemma3", 3))
    kept = distinct(runner.model.layers)
    assert [layer.attention.first.shape.window for layer in kept] == [16, None]


def test_shapes_stay_within_the_limits() -> None:
    for shape in shapes(StepShape(32, 4, 1000, False)):
        assert shape.rows <= 32
        assert shape.sequences <= 4
        assert shape.width <= 128
