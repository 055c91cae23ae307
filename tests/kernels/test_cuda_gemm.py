"""Products of many rows in tiles and clusters, on an emulated GPU, against plain operations; what is chosen."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.cuda import CudaUnavailableError, gemm, nvrtc
from liushui.kernels.cuda.gemm import Form, Gemm
from liushui.kernels.triton import products, vendor, wide
from liushui.kernels.triton import rows as row_kernels
from liushui.kernels.triton.ops import TritonOps
from tests.kernels.triton_support import DEVICE, Compiler, close, on_device

EMULATION = Path(__file__).parent / "emulated_gpu"


def emulated(form: Form, folder: Path, slots: int) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = folder / "gemm.so"
    defines = [f"-D{k}={v}" for k, v in (form.defines() | {"SLOTS": slots}).items()]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
    folders = [f"-I{EMULATION}", f"-I{nvrtc.FOLDER}"]
    subprocess.run(["g++", *flags, *folders, *defines, str(EMULATION / "run_gemm.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target)).run_gemm


def expected(form: Form, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rounded where the separate kernels round."""
    y = (x.double() @ weight.double().T).bfloat16().float()
    if form.gated:
        gate, up = y.chunk(2, 1)
        y = gate / (1 + torch.exp(-gate)) * up
    return y.bfloat16()


@pytest.mark.parametrize(
    ("form", "rows", "columns", "k", "slots", "clusters"),
    [
        (Form(32), 70, 72, 136, 5, 1),
        (Form(32, team=2, down=2, gated=True), 200, 104, 200, 3, 1),
        (Form(32, teams=2, tall=2), 333, 200, 200, 4, 2),
        (Form(64, teams=2, down=2, gated=True), 333, 136, 264, 3, 1),
        (Form(48, team=3), 100, 200, 128, 2, 3),
        (Form(48, gated=True), 64, 120, 192, 2, 2),
        (Form(64, down=4), 250, 136, 320, 2, 1),
    ],
    ids=[
        "one warpgroup",
        "gated, down",
        "two teams",
        "gated, two teams",
        "three warpgroups",
        "odd columns",
        "four down",
    ],
)
def test_tiles_cover_the_product(
    form: Form, rows: int, columns: int, k: int, slots: int, clusters: int, tmp_path: Path
) -> None:
    """Sizes that are no multiples of the tiles, blocks with several tiles each, a ring that goes round."""
    run, g = emulated(form, tmp_path, slots), torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=g).bfloat16()
    weight = (torch.randn(columns * (1 + form.gated), k, generator=g) * 0.2).bfloat16()
    room = torch.full((rows + 1, columns), torch.nan).bfloat16()
    want, out = expected(form, x, weight), room[:rows]
    call = Gemm(form, x.device, b"").call(x, weight, out)
    blocks = min(clusters, call.down * call.across) * form.down
    assert run(ctypes.byref(call), blocks) == 1, "the blocks wait for one another"
    assert (out.double() - want.double()).norm() < 1e-3 * want.double().norm()
    assert room[rows].isnan().all(), "nothing is written behind the last row"


@pytest.mark.parametrize("rows", [64, 100, 128, 192, 256, 640, 8192])
@pytest.mark.parametrize(("columns", "k"), [(1024, 3072), (4096, 14336), (6144, 4096), (14336, 4096), (3072, 1024)])
@pytest.mark.parametrize("gated", [False, True])
def test_forms_that_are_tried_fit_the_gpu(rows: int, columns: int, k: int, gated: bool) -> None:
    found = gemm.forms(rows, columns, k, gated)
    assert found or not gated or columns < 3072, "SwiGLU has a form for every row count"
    for form in found:
        assert form.gated == gated
        assert form.slots() >= 3, "copies run ahead of the products"
        assert form.width in range(16, 257, 16)
        assert form.width % ((16 if gated else 8) * form.down) == 0
        assert form.tall * form.width // 2 <= 192, "sums fit the registers"
        down, across = form.clusters(rows, columns)
        assert down * form.down * form.rows >= rows
        assert across * form.columns >= columns


class Right:
    """A form whose bits are those of the separate kernels, or not."""

    def __init__(self, form: Form, device: torch.device, code: bytes) -> None:
        if code == b"refused":
            raise CudaUnavailableError("no room\nfor it")
        self.form, self.wrong, self.odd = form, code == b"wrong", code == b"odd"

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.odd:
            raise TypeError("not foreseen")
        y = products.product(x, weight, None, False, products.reference_tiles(weight))
        return out.copy_((row_kernels.activate(y, True, "silu", False) if self.form.gated else y) + int(self.wrong))


@pytest.mark.parametrize("code", [b"right", b"wrong", b"refused", b"none", b"odd"])
def test_a_form_serves_once_it_is_compiled_and_right(code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, compiler = TritonOps(DEVICE), Compiler("gemm.cu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(wide, "Gemm", Right)
    monkeypatch.setattr(wide, "FITS", (torch.float32,))
    monkeypatch.setattr(wide, "forms", lambda *sizes: [Form(48, gated=sizes[-1])])
    monkeypatch.setattr(vendor, "_fastest", lambda found, *_: found[-1])
    compiler.serve(ops.forms, monkeypatch)
    x, packed = on_device(torch.randn(128, 64)), ops.pack_linear(on_device(torch.randn(96, 64)))
    separate = ops.linear_then(x, packed, None, ops.silu_mul)
    assert not compiler.asked, "the first use waits for nothing"
    assert ops.report()[-1].endswith("tried beside the vendor's once they are compiled")
    changed = []
    for _ in range(8):
        changed.append(ops.try_forms())
        for future in compiler.asked:
            if not future.done():
                close(ops.linear_then(x, packed, None, ops.silu_mul), separate, 1e-6)
                if code == b"none":
                    future.set_exception(CudaUnavailableError("no compiler"))
                else:
                    future.set_result(code)
    assert not ops.untried
    assert [found for found in changed if found] == ([{128}] if code == b"right" else []), "all at once, at the end"
    assert len(compiler.asked) == (1 if code in (b"refused", b"none", b"odd") else 2), "with and without the activation"
    together, alone = ops.together[96, 64, torch.float32][128], ops.certificate(packed.data, None).choices[128]
    assert isinstance(together, wide.Candidate) == isinstance(alone, wide.Candidate) == (code == b"right")
    close(ops.linear_then(x, packed, None, ops.silu_mul), separate, 1e-6)
    close(ops.linear_then(x, ops.pack_linear(odd_address(packed.data)), None, ops.silu_mul), separate, 1e-6)
    report = "\n".join(ops.report())
    assert ("in one kernel: 128" in report) == (code == b"right")
    assert ("no more are tried (no room)" in report) == (code == b"refused")
    assert ("no more are tried (no compiler)" in report) == (code == b"none")
    assert ("no more are tried (not foreseen)" in report) == (code == b"odd")


def odd_address(weight: torch.Tensor) -> torch.Tensor:
    """The same, where the copy engine cannot read it."""
    room = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
    return room[1:].view_as(weight).copy_(weight)


def test_without_memory_for_a_trial_what_serves_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    weight, first = on_device(torch.randn(96, 64)), torch.nn.functional.linear
    monkeypatch.setattr(vendor.Trial, "__init__", full)
    assert vendor.better(first, [vendor.Own(False)], 128, weight) is first
    assert vendor.choose(128, weight, None, False, first) is first
    assert vendor.choose(128, weight, None) is None


def test_forms_are_for_row_counts_that_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    weight = torch.empty(28672, 4096, dtype=torch.bfloat16, device="meta")
    forms = wide.Forms(torch.device("cuda"))
    assert [rows for rows in (32, 64, 100, 256, 8192) if forms.wanted(rows, weight, True)] == [64, 256, 8192]
    assert not forms.wanted(8192, weight.float(), True)
    forms.note = "no compiler"
    assert not forms.wanted(8192, weight, True)
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        other = wide.Forms(torch.device("cuda"))
        assert not other.wanted(8192, weight, True)
        assert other.report() == []


def test_other_activations_and_biases_are_left_alone() -> None:
    ops = TritonOps(DEVICE)
    x, weight, bias = (on_device(torch.randn(*size)) for size in ((80, 32), (64, 32), (64,)))
    packed = ops.pack_linear(weight)
    close(ops.linear_then(x, packed, bias, ops.silu_mul), ops.silu_mul(ops.linear(x, packed, bias)), 1e-6)
    close(ops.linear_then(x, packed, None, ops.gelu_tanh_mul), ops.gelu_tanh_mul(ops.linear(x, packed)), 1e-6)
    assert not ops.together
