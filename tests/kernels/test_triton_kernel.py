"""Launching beside compilations: a launch waits for its own kernel and for no other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.triton.common import Kernel

META = torch.empty(1, device="meta")


class Compiling:
    """Stands for Triton's function, its compilations and their launches."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(do_not_specialize=flag) for flag in (False, False, True)]
        self.waited: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
        future = SimpleNamespace(done=lambda: False)
        return SimpleNamespace(future=future, result=lambda: self.waited.append((*arguments[1:], *constants.values())))

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.launched.append((*arguments[1:], *constants.values()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(Kernel, "coming", {})
    return Kernel(Compiling())


def test_a_launch_waits_for_its_own_compilation(kernel: Kernel) -> None:
    real = torch.empty(1)
    for rows, tile in ((1, 16), (16, 16), (16, 64)):
        kernel[(1,)](META, rows, 5, TILE=tile)
    assert not kernel.ready(real, 8, 1, TILE=16)
    kernel[(1,)](real, 8, 1, TILE=16)  # 8 rows run what was compiled for 16, whatever is not specialised
    assert kernel.function.waited == [(16, 5, 16)]
    assert kernel.ready(real, 32, 5, TILE=16)
    kernel[(1,)](real, 1, 5, TILE=16)
    assert kernel.function.waited == [(16, 5, 16), (1, 5, 16)]
    kernel[(1,)](real, 3, 5, TILE=32)  # met by no rehearsal
    assert len(kernel.function.waited) == 2
    assert kernel.function.launched == [(8, 1, 16), (1, 5, 16), (3, 5, 32)]


def test_a_compilation_that_failed_comes_again_with_the_launch(kernel: Kernel) -> None:
    def fails() -> None:
        raise RuntimeError("ptxas")

    kernel.function.warmup = lambda *_, **__: SimpleNamespace(future=None, result=fails)
    kernel[(1,)](META, 2, 2, TILE=16)
    kernel[(1,)](torch.empty(1), 2, 2, TILE=16)
    assert kernel.function.launched == [(2, 2, 16)]
