"""Which implementation is taken, and what is said about it."""

from pathlib import Path

import pytest
import torch

from liushui.errors import ParameterError
from liushui.kernels import native
from liushui.kernels.ops import load_ops
from tests.kernels.conftest import IMPLEMENTATIONS

needs_native = pytest.mark.skipif(set(IMPLEMENTATIONS) == {"torch"}, reason="the native library is not built")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    native._library.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    yield tmp_path
    native._library.cache_clear()


def test_without_a_library_auto_falls_back_and_says_why(no_library: Path) -> None:
    (no_library / "_cpu.reason").write_text("no C++ compiler found\n", encoding="utf-8")
    ops = load_ops("auto", 1)
    assert ops.name == "torch"
    assert ops.note == "native kernels: not built (no C++ compiler found): using plain torch"
    with pytest.raises(ParameterError, match=r"kernels: .*not built.*g\+\+"):
        load_ops("native", 1)


def test_a_broken_library_is_no_library(no_library: Path) -> None:
    (no_library / "_cpu.so").write_bytes(b"not a library")
    assert "cannot be loaded" in load_ops("auto", 1).note


@needs_native
def test_the_best_instruction_set_is_taken() -> None:
    ops = load_ops("auto", 2)
    assert ops.name == "native"
    best = next(isa for isa in native.INSTRUCTION_SETS if isa in IMPLEMENTATIONS)
    assert best in ops.note
    assert "2 threads" in ops.note


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ParameterError, match="mmx"):
        load_ops("native", 1, isa="mmx")


@needs_native
@pytest.mark.parametrize("tensor", [torch.zeros(2, 4).t(), torch.zeros(4, 2).half()], ids=["stride", "float16"])
def test_what_raw_pointers_must_not_see_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="native kernels take"):
        load_ops("native", 1).rms_norm(tensor, torch.ones(2), 1e-6)
