"""One kernel for a step of one row: for which models, and only where it gives the same bits in less time."""

from itertools import count
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.cuda import CudaUnavailableError
from liushui.layers import one_row
from liushui.layers.one_row import OneRow
from tests.kernels.triton_support import COMPILED
from tests.support import tiny

pytestmark = pytest.mark.skipif(COMPILED, reason="on a GPU test_gpu_one_row has the real kernel")
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE |= {"head_dim": 64, "num_hidden_layers": 2, "vocab_size": 67}


def _runner(family: str, dtype: str = "bfloat16", **changes: Any) -> Any:
    return tiny.runner(tiny.oracle(family, **changes), dtype=dtype, kernels="triton", block_size=16)


@pytest.mark.parametrize(
    ("family", "dtype", "changes", "reason"),
    [
        ("llama", "bfloat16", WIDE, None),
        ("qwen3", "bfloat16", WIDE, None),
        ("llama", "float32", WIDE, "not in bfloat16"),
        ("llama", "bfloat16", {}, "a width is no multiple of 512"),
        ("llama-bias", "bfloat16", WIDE, "products with biases"),
        ("mistral-window", "bfloat16", WIDE, "a sliding window"),
        ("phi3-partial-rope", "bfloat16", WIDE, "heads that are not rotated as a whole"),
        ("gpt2", "bfloat16", {}, "layers that are not plain"),
        ("gemma3", "bfloat16", {}, "layers that are not plain"),
        ("mixtral", "bfloat16", {}, "layers that are not plain"),
    ],
)
def test_models_without_a_kernel_are_told_apart(family: str, dtype: str, changes: dict[str, Any], reason: Any) -> None:
    runner = _runner(family, dtype, **changes)
    assert one_row._refusal(runner.model, runner.kv) == reason


class Kernel:
    """Stands in for the decoder: adds one, and leaves the new keys and values as `_parts` does; `off` counts more."""

    def __init__(self, kv: Any, off: float = 0.0, refuses: bool = False) -> None:
        self.kv, self.off, self.refuses = kv, off, refuses

    def __call__(self, x: Any, positions: Any, slots: Any, lengths: Any, table: Any) -> None:
        if self.refuses:
            raise CudaUnavailableError("too large")
        _step(x, self.kv, int(slots))
        x[0, 7] += self.off


def _step(x: torch.Tensor, kv: Any, slot: int) -> None:
    x += 1
    for cache in (kv.keys, kv.values):
        cache[:, slot // 16, :, slot % 16] = x[0, : cache.shape[-1]]


def _certified(monkeypatch: pytest.MonkeyPatch, faster: bool = True, **kernel: Any) -> OneRow:
    times = count(0, 1 if faster else -1)
    monkeypatch.setattr(one_row, "_milliseconds", lambda run: next(times))
    monkeypatch.setattr(one_row, "stream", lambda x, layers, ops, kv, batch: _step(x, kv, int(batch.slots)))
    runner = _runner("llama", **WIDE)
    found = OneRow(runner.model, None, runner.kv, 16)
    assert (found.note, found.decoder) == ("", None), "nothing of it on a processor"
    found.decoder = Kernel(runner.kv, **kernel)  # type: ignore[assignment]
    found.certify()
    return found


def test_the_same_bits_in_less_time_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _certified(monkeypatch)
    assert found.decoder is not None
    assert found.note == "steps of one row: one kernel (0.00 ms of layers; the other way 1.00)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"off": 0.5}, "at 1 tokens one kernel gave other bits"),
        ({"faster": False}, "kernel by kernel (-1.00 ms"),
        ({"refuses": True}, "too large"),
    ],
)
def test_else_steps_go_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str) -> None:
    found = _certified(monkeypatch, **options)
    assert found.decoder is None
    assert words in found.note
