"""y = x @ weight.T for many rows on Hopper, also with SwiGLU behind it: forms and launches of `gemm.cu`.

A form is what the kernel is compiled for, its tiles and how blocks share them; it does not touch the bits. Forms are
compiled in a thread of their own at their first use; until one is there, another product serves.
"""

import ctypes
import math
from dataclasses import dataclass

import torch

from liushui.kernels.cuda import CudaUnavailableError
from liushui.kernels.cuda.driver import Kernel, TensorMap, boxes

SHARED_BYTES = 232_448
"""Of a Hopper multiprocessor."""
MULTIPROCESSORS = 132
"""Of an H100, which the forms were measured on."""
DEPTH = 64
"""Columns of x and of the weight in a place of the ring."""
BAND = 2048
"""Rows of x that stay in the second-level cache while weights pass by."""
_STAGED = 16 * 144
"""Bytes by way of which a warp writes its results."""


@dataclass(frozen=True, slots=True)
class Form:
    """See `gemm.cu`."""

    width: int
    """Weight rows of a tile."""
    team: int = 1
    """Warpgroups that share the rows of a tile."""
    teams: int = 1
    tall: int = 1
    """Tiles of 64 rows of a warpgroup."""
    down: int = 1
    """Blocks of a cluster, which share the weights of their tiles."""
    gated: bool = False

    @property
    def rows(self) -> int:
        """Of x in a tile."""
        return 64 * self.tall * self.team

    @property
    def columns(self) -> int:
        """Of y in a tile."""
        return self.width // 2 if self.gated else self.width

    @property
    def threads(self) -> int:
        workers = self.team * self.teams
        return 384 if workers == 2 else 128 * workers + 32

    def slots(self) -> int:
        """Places of the ring: what shared memory has beside the results on their way."""
        fixed = 1024 + self.team * self.teams * 4 * _STAGED
        return min(16, (SHARED_BYTES - fixed) // ((self.rows + self.width) * DEPTH * 2 + 16))

    def clusters(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles of clusters down and across y [rows, columns]."""
        return math.ceil(rows / (self.rows * self.down)), math.ceil(columns / self.columns)

    def defines(self) -> dict[str, int]:
        sums = self.width // 2
        return {
            "BN": self.width, "PARTS": self.width // 16, "TEAM": self.team, "TEAMS": self.teams, "TALL": self.tall,
            "DOWN": self.down, "GATED": int(self.gated),
            "SLOTS": self.slots(), "IN_A": sums, "IN_B": sums + 1, "IN_KEEP": sums + 2, "CHAINED": 1, "GUARD": 0,
        }  # fmt: skip


def forms(rows: int, columns: int, k: int, gated: bool) -> list[Form]:
    """Those worth a trial for y [rows, columns] (measured on an H100)."""
    large, head = columns * k * (1 + gated) >= 2**24, columns > 2**16
    if rows >= 512:
        pair = [Form(192, teams=2, tall=2, down=2, gated=gated)] if columns >= 3072 else []
        return [*pair, Form(256, team=2, down=2, gated=gated)] if pair and rows >= 2048 else pair
    if head:
        return [] if rows <= 64 else [Form(256, team=2)] if rows <= 128 else [Form(256, team=2, down=2)]
    if gated:
        return [_few_rows_gated(rows, large)]
    if rows > 64 or not large or k > 2 * columns:  # next to nothing is gained
        return []
    # As many tiles as multiprocessors, or a few less.
    return [Form(min(256, 16 * math.ceil(columns / MULTIPROCESSORS / 16)))]


def _few_rows_gated(rows: int, large: bool) -> Form:
    if rows <= 64:
        return Form(224 if large else 48, gated=True)
    if rows <= 128:
        return Form(224 if large else 48, team=2, gated=True)
    if rows <= 192:
        return Form(112 if large else 48, team=3, gated=True)
    return Form(224 if large else 96, team=2, down=2, gated=True)


class Call(ctypes.Structure):
    """The kernel's parameter; in C++ its size is rounded up to 64 bytes."""

    _fields_ = [
        ("x", TensorMap), ("weight", TensorMap), ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "columns", "steps", "down", "across", "band")),
        ("more", ctypes.c_ubyte * 32),
    ]  # fmt: skip


class Gemm:
    """One form on the current device. On a CPU (tests) there is no kernel, only its parameter."""

    def __init__(self, form: Form, device: torch.device, code: bytes) -> None:
        """Raises `CudaUnavailableError` where the compiled form cannot be loaded."""
        self.form = form
        if device.type == "cuda":
            self.kernel = Kernel(code, "multiply", form.threads)
            self.resident = self.kernel.clusters(form.down)
            if self.resident < 1:
                raise CudaUnavailableError("its clusters do not fit on the GPU")

    def call(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Call:
        form, (rows, k), columns = self.form, x.shape, out.shape[1]
        down, across = form.clusters(rows, columns)
        part = form.width // form.down
        maps = [_map(x, (k, rows), (64, form.rows))]
        if form.gated:
            maps.append(_map(weight, (k, 8, 2, columns // 8), (64, 8, 2, part // 16)))
        else:
            maps.append(_map(weight, (k, columns), (64, part)))
        band = min(down, max(1, BAND // (form.rows * form.down)))
        sizes = (rows, columns, math.ceil(k / DEPTH), down, across, band)
        return Call(*(TensorMap.from_buffer_copy(m) for m in maps), out.data_ptr(), *sizes)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x [M, K], weight [N, K], or [2 N, K] where `gated`, -> out [M, N]; all contiguous bfloat16."""
        call = self.call(x, weight, out)
        count = min(self.resident, call.down * call.across)
        self.kernel.launch_clusters(count, self.form.down, call, True)
        return out


def _map(tensor: torch.Tensor, sizes: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """Of rows of K = sizes[0] values, or of groups of eight rows of two halves."""
    k = sizes[0]
    strides = (2 * k,) if len(sizes) == 2 else (2 * k, 16 * k * sizes[3], 16 * k)
    if tensor.device.type == "cuda":
        return boxes(tensor.data_ptr(), sizes, strides, box)
    # What the emulated copy engine reads (tests).
    rows, box_rows, half = math.prod(sizes[1:]), math.prod(box[1:]), 8 * sizes[3] if len(sizes) > 2 else 0
    return b"".join(n.to_bytes(8, "little") for n in (tensor.data_ptr(), k, rows, box_rows, half)) + b"\0" * 88
