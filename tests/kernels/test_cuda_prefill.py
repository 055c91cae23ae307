"""Attention of prompts in CUDA C++: on an emulated GPU against float64; what serves until it is compiled."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.cuda import CudaUnavailableError, nvrtc
from liushui.kernels.cuda.prefill import Form, Prefill
from liushui.kernels.triton import attention, prompts
from liushui.kernels.triton.ops import TritonOps
from tests.kernels.paged import Heads, Sequence, Share, attend
from tests.kernels.triton_support import DEVICE, Compiler, close, on_device

EMULATION = Path(__file__).parent / "emulated_gpu"


class Emulated:
    """The kernel by so many blocks, each GPU thread a fiber."""

    def __init__(self, form: Form, folder: Path, blocks: int) -> None:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        target = folder / "prefill.so"
        defines = [f"-D{k}={v}" for k, v in form.defines().items()]
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
        command = ["g++", *flags, f"-I{EMULATION}", f"-I{nvrtc.FOLDER}", *defines, str(EMULATION / "run_prefill.cpp")]
        subprocess.run([*command, "-o", str(target)], check=True)
        self.form, self.blocks, self.run = form, blocks, ctypes.CDLL(str(target)).run_prefill

    def attention(self, qkv, hq, hk, d, k, v, starts, lens, table, scale, window):
        out = torch.full((len(qkv), hq * d), torch.nan, dtype=qkv.dtype)
        one = Prefill(self.form, qkv.device, b"")
        for _ in range(2):  # what a launch leaves behind serves the next
            call = one.call(qkv, k, v, out, starts, lens, table, scale * attention.LOG2E)
            assert self.run(ctypes.byref(call), self.blocks) == 1, "the blocks wait for one another"
            assert int(one.taken) == 0
        return out


@pytest.mark.parametrize(
    ("heads", "form", "block_size", "ends", "blocks"),
    [
        (Heads(4, 2, 64), {"stages": (2, 2)}, 64, (1, 2, 65, 130, 64, 33), 3),
        (Heads(2, 2, 64), {"stages": (3, 2), "workers": 3}, 64, (3, 200, 197), 2),
        (Heads(7, 1, 64), {"stages": (3, 3)}, 128, (600, 49, 1), 2),
        (Heads(3, 1, 128), {"stages": (3, 2), "workers": 3}, 64, (90,), 5),
        (Heads(4, 2, 64), {"stages": (2, 2)}, 64, (*[1] * 31, 70, *[1] * 30, 2, 2, 2, 100), 2),
    ],
    ids=["pairs", "three warpgroups", "several splits", "odd group", "between many that decode"],
)
def test_close_to_float64(
    heads: Heads, form: dict[str, Any], block_size: int, ends: tuple[int, ...], blocks: int, tmp_path: Path
) -> None:
    """Chunks of any length at any place beside rows of one token, what lies behind the last key anything."""
    luck, shares = random.Random(heads.queries), []
    for seed, end in enumerate(ends):
        start = luck.choice([0, end - 1, luck.randrange(end)])
        shares.append(Share(Sequence.random(heads, end, torch.bfloat16, seed), start, end))
    one = Form(heads.queries, heads.kv, heads.dim, block_size, **form)
    for share, got in zip(shares, attend(Emulated(one, tmp_path, blocks), shares, block_size=block_size), strict=True):
        if share.end - share.start < 2:
            assert got.isnan().all(), "rows of one token are left alone"
            continue
        close(got, share.sequence.expected(0.125, None)[share.start : share.end], 1.6e-2)


@pytest.mark.parametrize(
    ("hq", "hk", "d"), [(32, 8, 128), (16, 8, 128), (14, 2, 64), (9, 3, 64), (64, 1, 128), (8, 8, 128)]
)
def test_forms_fit_the_gpu(hq: int, hk: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = on_hopper(monkeypatch).form(attention.Shape(hq, hk, d, 64), torch.bfloat16, None)
    assert one is not None
    assert hq // hk <= one.padded <= prompts.ROWS
    assert one.shared_bytes() <= 232448
    assert min(one.stages) >= 2
    assert one.tokens * one.padded == one.workers * prompts.ROWS


def test_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_hopper(monkeypatch)
    shape = attention.Shape(8, 2, 128, 64)
    assert found.form(shape, torch.bfloat16, None)
    assert found.form(shape, torch.float16, None)
    assert not found.form(shape, torch.float32, None)
    assert not found.form(shape, torch.bfloat16, 100)
    assert not found.form(attention.Shape(8, 2, 96, 64), torch.bfloat16, None)
    assert not found.form(attention.Shape(8, 2, 128, 16), torch.bfloat16, None)
    assert not found.form(attention.Shape(65, 1, 128, 64), torch.bfloat16, None)
    found.paused = True
    assert not found.form(shape, torch.bfloat16, None)
    assert prompts.Prompts(torch.device("cpu")).report() == []


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> prompts.Prompts:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return prompts.Prompts(torch.device("cuda"))


class Loaded:
    """A kernel that notes that it was launched."""

    launched = 0

    def __init__(self, form: Form, device: torch.device, code: bytes) -> None:
        if code == b"refused":
            raise CudaUnavailableError("no room\nfor it")

    def __call__(self, qkv, k, v, out, *_: Any) -> None:
        Loaded.launched += 1
        out.fill_(7)


@pytest.mark.parametrize("code", [b"right", b"refused", b"none"])
def test_it_serves_once_it_is_compiled(code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then, and where it cannot be had, the others serve, and no step is captured as a graph before."""
    ops, compiler, heads = TritonOps(DEVICE), Compiler("prefill.cu"), Heads(2, 1, 64)
    ops.prompts = on_hopper(monkeypatch)
    compiler.serve(ops.prompts, monkeypatch)
    monkeypatch.setattr(prompts, "Prefill", Loaded)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    share = Share(Sequence.random(heads, 5, torch.float16, 1), 0, 5)
    Loaded.launched = 0

    def run() -> torch.Tensor:
        class Moved:
            def attention(self, *given: Any) -> torch.Tensor:
                return ops.attention(*(on_device(x) if isinstance(x, torch.Tensor) else x for x in given)).cpu()

        return attend(Moved(), [share], block_size=64)[0]

    first = run()
    close(first, share.sequence.expected(0.125, None), 1.6e-2)
    assert torch.equal(run(), first)
    assert len(compiler.asked) == 1
    assert ops.prompts.coming
    if code == b"none":
        compiler.asked[0].set_exception(CudaUnavailableError("no compiler"))
    else:
        compiler.asked[0].set_result(code)
    assert ops.prompts.coming, "not before it was launched"
    then = run()
    assert not ops.prompts.coming
    assert Loaded.launched == (code == b"right")
    assert (then == 7).all() if code == b"right" else torch.equal(then, first)
    notes = {b"right": "CUDA C++", b"refused": "no room", b"none": "no compiler"}
    assert notes[code] in ops.prompts.report()[0]
