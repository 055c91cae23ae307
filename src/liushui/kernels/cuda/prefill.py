"""Attention of prompts on Hopper: launches of `prefill.cu`, whose bits are those of `kernels.triton.attention`."""

import ctypes
import math
from dataclasses import dataclass

import torch

from liushui.kernels.cuda.driver import Kernel, TensorMap, boxes

TILE = 64
"""Keys that are fetched at once: they lie in one block of the cache."""
ROWS = 64
"""Rows of a warpgroup: a row is one head of one token."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    workers: int = 2
    """Warpgroups of a block."""
    stages: tuple[int, int] = (4, 4)
    """Tiles of keys, and of values, on their way or in use."""
    half: bool = False
    """Values are float16; else bfloat16."""

    @property
    def padded(self) -> int:
        """Rows of a token: the query heads of one KV head, or the next power of two."""
        return 1 << (self.num_heads // self.num_kv_heads - 1).bit_length()

    @property
    def tokens(self) -> int:
        """Whose queries a block has at once."""
        return self.workers * ROWS // self.padded

    @property
    def threads(self) -> int:
        return 128 * (self.workers + 1)

    def shared_bytes(self) -> int:
        """What a block takes, without barriers and letters."""
        tiles = (sum(self.stages) + self.workers) * TILE * self.head_dim * 2
        return 3072 + tiles + self.workers * ROWS * self.head_dim * 4

    def defines(self) -> dict[str, int]:
        return {
            "DIM": self.head_dim, "HEADS": self.num_heads, "KV_HEADS": self.num_kv_heads, "PADDED": self.padded,
            "BLOCK": self.block_size, "WORKERS": self.workers, "K_STAGES": self.stages[0], "V_STAGES": self.stages[1],
            "HALF": int(self.half), "CHAINED": 1, "GUARD": 0,
        }  # fmt: skip


class Call(ctypes.Structure):
    """The kernel's parameter; in C++ its size is rounded up to 64 bytes."""

    _fields_ = [
        *((name, TensorMap) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("out", "query_start", "seq_lens", "block_table", "taken")),
        *((name, ctypes.c_int) for name in ("sequences", "table_stride")), ("scale", ctypes.c_float),
        ("more", ctypes.c_ubyte * 12),
    ]  # fmt: skip


class Prefill:
    """One form on the current device. On a CPU (tests) there is no kernel, only its parameter."""

    def __init__(self, form: Form, device: torch.device, code: bytes) -> None:
        """Raises `CudaUnavailableError` where the compiled form cannot be loaded."""
        self.form = form
        self.taken = torch.zeros(1, dtype=torch.int32, device=device)
        """How many tiles were taken besides each block's first; zero before and after."""
        if device.type == "cuda":
            self.kernel = Kernel(code, "prefill", form.threads)
            self.resident = self.kernel.clusters(1)

    def call(
        self, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor,
        query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float,
    ) -> Call:  # fmt: skip
        form, (sequences, width) = self.form, block_table.shape
        heads = form.num_heads + 2 * form.num_kv_heads
        queries = _map(qkv, (form.head_dim, heads, qkv.shape[0]), (64, form.padded, ROWS // form.padded))
        rows = k_cache.shape[0] * form.num_kv_heads * form.block_size
        keys, values = (_map(cache, (form.head_dim, rows), (64, TILE)) for cache in (k_cache, v_cache))
        places = (x.data_ptr() for x in (out, query_start, seq_lens, block_table, self.taken))
        maps = (TensorMap.from_buffer_copy(m) for m in (queries, keys, values))
        return Call(*maps, *places, sequences, width, scale)

    def __call__(
        self, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor,
        query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float,
    ) -> None:  # fmt: skip
        """Fill `out` for the sequences that feed two tokens or more; `scale` includes log2(e)."""
        call = self.call(qkv, k_cache, v_cache, out, query_start, seq_lens, block_table, scale)
        tiles = self.form.num_kv_heads * (qkv.shape[0] // self.form.tokens + block_table.shape[0])  # or fewer
        self.kernel.launch_clusters(min(self.resident, tiles), 1, call, True)


def _map(tensor: torch.Tensor, sizes: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """For the copy engine: two-byte values, the innermost dimension first, nothing between them."""
    if tensor.device.type == "cuda":
        strides = tuple(2 * math.prod(sizes[: i + 1]) for i in range(len(sizes) - 1))
        return boxes(tensor.data_ptr(), sizes, strides, box)
    # What the emulated copy engine reads (tests).
    words = (
        tensor.data_ptr(),
        sizes[0],
        *((math.prod(sizes[1:]), math.prod(box[1:]), 0) if len(sizes) == 2 else (*sizes[1:], *box[1:])),
    )
    return b"".join(n.to_bytes(8, "little") for n in words).ljust(128, b"\0")
