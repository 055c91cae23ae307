"""All layers in one launch, on an emulated GPU, against plain operations."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from liushui.kernels.cuda import CudaUnavailableError, decoder, nvrtc
from liushui.kernels.cuda.decoder import Decoder, Layer, Shape
from liushui.kernels.reference import TorchOps

EMULATION = Path(__file__).parent / "emulated_gpu"
EPS, SCALE = 1e-6, 0.1


@dataclass
class Case:
    """Layers, and rows of some lengths whose blocks lie in no order; behind the last key lies NaN."""

    shape: Shape
    lengths: list[int]
    blocks: int
    """Of the emulated GPU."""
    slots: int
    """Of the ring."""

    def __post_init__(self) -> None:
        size, g = self.shape.block, torch.Generator().manual_seed(1)
        needed = [-(-length // size) for length in self.lengths]
        self.width = max(needed) + 1
        self.layers = random_layers(self.shape, sum(needed) + 1, g)
        order = torch.randperm(sum(needed), generator=g).int() + 1
        self.table = torch.zeros(len(self.lengths), self.width, dtype=torch.int32)
        for row, part in enumerate(order.split(needed)):
            self.table[row, : len(part)] = part
        last = [max(0, n - 1) for n in self.lengths]
        slots = [int(self.table[i, p // size]) * size + p % size if self.lengths[i] else -1 for i, p in enumerate(last)]
        self.positions, self.places, self.seq_lens = (
            torch.tensor(v, dtype=torch.int32) for v in (last, slots, self.lengths)
        )
        for i, n in enumerate(self.lengths):
            for cache in (c for layer in self.layers for c in (layer.keys, layer.values) if n % size):
                cache[int(self.table[i, n // size]), :, n % size :] = torch.nan

    def row(self, seed: int) -> torch.Tensor:
        return torch.randn(
            len(self.lengths), self.shape.hidden, generator=torch.Generator().manual_seed(seed)
        ).bfloat16()

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, list[Layer]]:
        """The rows after plain operations one by one, and layers with the caches as they are then."""
        s, ops, after = self.shape, TorchOps(1), [with_own_cache(layer) for layer in self.layers]
        starts, heads = torch.arange(len(x) + 1, dtype=torch.int32), (s.heads, s.kv_heads, s.dim)
        for layer in after:
            qkv = linear(ops.rms_norm(x, layer.input_norm, EPS), layer.qkv)
            ops.qkv_to_cache(
                qkv, *heads, self.positions, self.places, layer.keys, layer.values, layer.rope, layer.q_norm,
                layer.k_norm, EPS,
            )  # fmt: skip
            lengths = self.seq_lens.clamp(min=1)
            mixed = ops.attention(qkv, *heads, layer.keys, layer.values, starts, lengths, self.table, SCALE)
            x = x + linear(mixed, layer.output)
            inner = ops.silu_mul(linear(ops.rms_norm(x, layer.mlp_norm, EPS), layer.gate_up))
            x = x + linear(inner, layer.down)
        return x, after


def with_own_cache(layer: Layer) -> Layer:
    parts = {name: getattr(layer, name) for name in Layer.__slots__}
    return Layer(**parts | {"keys": layer.keys.clone(), "values": layer.values.clone()})


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.double() @ weight.double().T).to(x.dtype)


def random_layers(shape: Shape, blocks: int, g: torch.Generator) -> list[Layer]:
    def draw(*size: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(size, generator=g) * std + mean).bfloat16()

    query, kv, hidden, inner = shape.heads * shape.dim, shape.kv_heads * shape.dim, shape.hidden, shape.inner
    angles = torch.rand(2048, shape.dim // 2, generator=g) * 6.3
    rope = torch.cat([angles.cos(), angles.sin()], 1)
    norms = [draw(shape.dim, std=0.1, mean=1.0) if shape.qk_norm else None for _ in range(2)]
    caches = [draw(shape.layers, blocks, shape.kv_heads, shape.block, shape.dim) for _ in range(2)]
    return [
        Layer(
            draw(query + 2 * kv, hidden, std=hidden**-0.5), draw(hidden, query, std=query**-0.5),
            draw(2 * inner, hidden, std=hidden**-0.5), draw(hidden, inner, std=inner**-0.5),
            draw(hidden, std=0.1, mean=1.0), draw(hidden, std=0.1, mean=1.0), *norms, rope,
            *(cache[i] for cache in caches),
        )
        for i in range(shape.layers)
    ]  # fmt: skip


def emulated(case: Case, folder: Path) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = folder / "decoder.so"
    defines = [f"-D{k}={v}" for k, v in (case.shape.defines() | {"SLOTS": case.slots, "BLOCKS": case.blocks}).items()]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing"]
    folders = [f"-I{EMULATION}", f"-I{nvrtc.FOLDER}"]
    subprocess.run(["g++", *flags, *folders, *defines, str(EMULATION / "run.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target)).run_decoder


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    got, want = got.double().nan_to_num(7.0), want.double().nan_to_num(7.0)
    return bool((got - want).norm() < 1e-2 * want.norm())


@pytest.mark.parametrize(
    "case",
    [
        Case(Shape(512, 512, 8, 4, 64, True, 1, 2, 16), [130], 3, 24),
        Case(Shape(512, 512, 4, 1, 128, False, 1, 2, 64), [545], 2, 23),
        Case(Shape(1024, 512, 8, 2, 64, True, 1, 1, 64), [7], 7, 26),
        Case(Shape(512, 512, 8, 4, 64, True, 4, 1, 32), [40, 0, 520], 3, 13),
    ],
    ids=["one split", "two splits", "groups of eight tiles and of one", "three rows of four"],
)
def test_all_layers_on_an_emulated_gpu(case: Case, tmp_path: Path) -> None:
    run = emulated(case, tmp_path)
    whole = Decoder(case.shape, case.layers, EPS, SCALE, case.width)
    live = [i for i, n in enumerate(case.lengths) if n]
    for turn in range(2):  # the second finds the tags of the first
        x = case.row(3 + turn)
        want, after = case.expected(x.clone())
        step = whole.step(x, case.positions, case.places, case.seq_lens, case.table)
        assert run(ctypes.byref(step), case.blocks) == 1, "the blocks wait for one another"
        assert close(x[live], want[live])
        for mine, other in zip(case.layers, after, strict=True):
            assert close(mine.keys, other.keys)
            assert close(mine.values, other.values)
        assert torch.equal(case.layers[0].values, after[0].values) or case.layers[0].values.isnan().any()
        assert whole.counter.tolist() == [0, turn + 1, 0], "ready for the next step"


def test_shapes_that_have_no_kernel_are_refused() -> None:
    fits = Shape(1024, 3072, 16, 8, 128, True, 1, 28, 64)
    assert fits.refusal() is None
    assert fits.defines()["SLOTS"] >= decoder.MIN_SLOTS
    for change, word in (
        ({"hidden": 1000}, "512"), ({"dim": 96, "heads": 32}, "96"), ({"layers": 127}, "127"), ({"block": 8}, "8"),
        ({"kv_heads": 1, "heads": 16}, "16 / 1"), ({"inner": 2**17}, "memory"),
    ):  # fmt: skip
        assert word in (Shape(**{**fits.__dict__, **change}).refusal() or "")


def test_machine_code_is_kept_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NVRTC is not asked twice for the same; what is damaged on the disk is made anew."""
    asked = []

    def compiled(library: Any, name: str, sources: dict[str, bytes], options: list[str]) -> bytes:
        asked.append(options)
        return b"\x7fELF machine code"

    class Library:
        def nvrtcVersion(self, major: Any, minor: Any) -> int:
            return 0

    monkeypatch.setattr(nvrtc, "_library", Library)
    monkeypatch.setattr(nvrtc, "_compiled", compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = nvrtc.machine_code("decoder.cu", {"ROWS": 1}, (9, 0))
    assert nvrtc.machine_code("decoder.cu", {"ROWS": 1}, (9, 0)) == code
    assert len(asked) == 1
    assert "--gpu-architecture=sm_90a" in asked[0]
    (kept,) = tmp_path.rglob("*.cubin")
    kept.write_bytes(b"cut off")
    assert nvrtc.machine_code("decoder.cu", {"ROWS": 1}, (9, 0)) == code
    nvrtc.machine_code("decoder.cu", {"ROWS": 2}, (9, 0))
    assert len(asked) == 3


def test_without_nvrtc_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_places", lambda: ["libnvrtc-that-is-not-there.so"])
    nvrtc._library.cache_clear()
    with pytest.raises(CudaUnavailableError, match="NVRTC"):
        nvrtc.machine_code("decoder.cu", {}, (9, 0))
