"""Triton kernels under test: compiled where there is a GPU, else in Triton's interpreter (see tests/conftest.py)."""

from concurrent.futures import Future
from functools import cache
from typing import Any

import pytest
import torch

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if COMPILED else torch.device("cpu")
MARK = [pytest.mark.gpu] if COMPILED else []
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if COMPILED else [])]  # the interpreter cuts bfloat16 off
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest ||out - reference|| / ||reference||: one rounding to the type."""


def _accept_new_numpy() -> None:
    """NumPy 2.4 refuses int() of one-element arrays, which Triton 3.6's interpreter asks for at loop bounds."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if not COMPILED:
    _accept_new_numpy()


class Compiler:
    """Compilations of one CUDA file that end when told to."""

    def __init__(self, source: str) -> None:
        self.source, self.asked = source, list[Future[bytes]]()

    def serve(self, behind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compile for `behind`, a `cuda.behind.Behind`, of which nothing was compiled before."""
        monkeypatch.setattr(behind, "_pool", self)
        monkeypatch.setattr(type(behind), "_code", {})

    def submit(self, _: Any, name: str, defines: dict[str, int], capability: tuple[int, int]) -> Future[bytes]:
        assert (name, capability) == (self.source, (9, 0))
        self.asked.append(Future())
        return self.asked[-1]


@cache
def ops():
    from liushui.kernels.triton.ops import TritonOps

    return TritonOps(DEVICE)


def fill(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Fresh random numbers on the CPU."""
    return torch.randn(*shape).to(dtype)


def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone().to(DEVICE)


def same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    """The same bits; in the interpreter, whose sums are numpy's, only close."""
    if COMPILED:
        assert torch.equal(got, expected)
    else:
        close(got, expected, tolerance)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got, expected = got.cpu().double(), expected.cpu().double()
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= tolerance * expected.norm() + 1e-30
