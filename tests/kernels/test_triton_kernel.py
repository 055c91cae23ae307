"""Launching beside compilations: a launch waits for its own kernel and for no other, and has its own launcher."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.triton.common import Kernel
from liushui.kernels.triton.launchers import from_a_file_of_its_own

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


def test_a_launcher_is_loaded_from_a_file_that_no_other_replaces(tmp_path: Path) -> None:
    """Though another process writes the one that both have found, as this one is reading it."""
    found = tmp_path / "launcher.so"
    found.write_bytes(b"mine")

    def load(name: str, path: str) -> bytes:
        assert name == "launcher"
        with open(path, "rb") as file:
            number = os.fstat(file.fileno()).st_ino
            (tmp_path / "theirs").write_bytes(b"theirs")
            os.replace(tmp_path / "theirs", found)
            assert os.stat(path).st_ino == number
            return file.read()

    assert from_a_file_of_its_own(load)("launcher", str(found)) == b"mine"
    assert os.listdir(tmp_path) == ["launcher.so"]


def test_a_launcher_where_nobody_may_write_is_loaded_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    assert from_a_file_of_its_own(lambda name, path: (name, path))("launcher", "/somewhere") == (
        "launcher",
        "/somewhere",
    )


def test_this_triton_loads_launchers_where_they_are_made_safe() -> None:
    from triton.runtime import build

    assert callable(build._load_module_from_path)
