"""All layers of a decoder in one launch, for one new token of each of a few sequences (`decoder.cu`)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from liushui.kernels.cuda import CudaUnavailableError
from liushui.kernels.cuda.driver import Kernel, TensorMap, tensor_map, tile_map
from liushui.kernels.cuda.nvrtc import machine_code

LOG2E = 1.4426950408889634
THREADS, MIN_BLOCKS = 288, 128
SPAN, UNIT, PIECE = 512, 32, 512
"""Keys of a split of attention, keys of a place of the ring, columns of a weight tile."""
SHARED_BYTES = 232_448
"""Of a Hopper multiprocessor."""
MAX_LAYERS = 126
MIN_SLOTS = 11
"""Four tiles are in use, four awaited, three places left out at the end of the ring."""


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    qk_norm: bool
    rows: int
    """Most sequences of a step, 1 to 8."""
    layers: int
    block: int
    """Tokens in a block of the cache."""

    def slots(self) -> int:
        """Places of the ring of weight tiles: what shared memory has beside the input of a product."""
        widest = max(self.hidden, self.inner, self.heads * self.dim)
        attention = 8 * (self.dim + 8) * 2 + 4 * self.dim + 8 * (SPAN + 8) * 2 + 24 * 32
        work = max(self.rows * widest * 2 + 256, attention) + 16
        slot = 8 * PIECE * 2
        fixed = work + 8 * self.rows * 12 + 32 + 88 * self.layers
        return (SHARED_BYTES - fixed) // (slot + 16)

    def refusal(self) -> str | None:
        """Why there is no kernel of this shape."""
        if any(size % PIECE for size in (self.hidden, self.inner, self.heads * self.dim)):
            return f"a width is no multiple of {PIECE}"
        if self.dim not in (64, 128) or self.heads % self.kv_heads or self.heads // self.kv_heads > 8:
            return f"heads {self.heads} / {self.kv_heads} x {self.dim}"
        if self.block < 16 or self.block & (self.block - 1) or self.layers > MAX_LAYERS or not 1 <= self.rows <= 8:
            return f"{self.layers} layers, blocks of {self.block}, {self.rows} rows"
        return None if self.slots() >= MIN_SLOTS else "shared memory is too small"

    def defines(self) -> dict[str, int]:
        return {
            "HIDDEN": self.hidden, "INNER": self.inner, "HEADS": self.heads, "KV_HEADS": self.kv_heads,
            "DIM": self.dim, "ROWS": self.rows, "QK_NORM": int(self.qk_norm), "LAYERS": self.layers,
            "BLOCK": self.block, "SLOTS": self.slots(), "GUARD": 1,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's tensors: weights [N, K], norms, rope [positions, D] float32, cache [blocks, Hk, block size, D]."""

    qkv: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: Tensor
    keys: Tensor
    values: Tensor

    def weights(self) -> list[Tensor]:
        return [self.qkv, self.output, self.gate_up, self.down]

    def pointers(self, maps: Tensor) -> list[int]:
        """As the kernel's `Layer`; `maps` [4, 128]: of the weights."""
        others = [getattr(self, name) for name in self.__slots__[4:]]
        return [part.data_ptr() for part in maps] + [0 if part is None else part.data_ptr() for part in others]


def splits_of(width: int, block_size: int) -> int:
    """Most splits of the keys of a sequence of `width` blocks."""
    return -(-width * block_size // SPAN)


class Step(ctypes.Structure):
    """The kernel's parameter; in C++ its size is rounded up to 64 bytes."""

    _fields_ = [
        ("key_map", TensorMap), ("value_map", TensorMap),
        *((name, ctypes.c_void_p) for name in (
            "layers", "stream", "mail", "positions", "slots", "lengths", "table", "counter",
        )),
        *((name, ctypes.c_int) for name in ("width", "splits", "cache_rows", "rows")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float), ("more", ctypes.c_ubyte * 40),
    ]  # fmt: skip


class Decoder:
    """Layers with their buffers. On a CPU (tests) there is no kernel, only its parameter."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], eps: float, scale: float, width: int) -> None:
        """`scale`: of attention's logits; `width`: most blocks of a sequence.

        The caches of all layers lie behind one another in one tensor, those of keys and those of values.
        Raises `CudaUnavailableError` where the kernel cannot run.
        """
        self.shape, self.eps, self.scale = shape, eps, scale
        self.layers = layers  # what the addresses point to
        keys, values = layers[0].keys, layers[0].values
        device = keys.device
        tiles = b"".join(_tile_map(weight) for layer in layers for weight in layer.weights())
        self.tiles = torch.frombuffer(bytearray(tiles), dtype=torch.uint8).view(-1, 4, 128).to(device)
        pointers = [layer.pointers(maps) for layer, maps in zip(layers, self.tiles, strict=True)]
        self.addresses = torch.tensor(pointers, dtype=torch.int64, device=device)
        query, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
        words = (2 * shape.hidden + 2 * query + 2 * kv + shape.inner) // 2
        parts = splits_of(width, shape.block) * shape.heads * (shape.dim + 2)
        self.mail = torch.zeros(2 * shape.rows * (words + parts), dtype=torch.int64, device=device)
        self.counter = torch.zeros(3, dtype=torch.int32, device=device)
        self.cache_rows = keys.numel() // shape.dim
        for name in ("keys", "values"):
            places = [getattr(layer, name).data_ptr() for layer in layers]
            if any(b - a != keys.nbytes for a, b in pairwise(places)):
                raise CudaUnavailableError("the layers' caches do not lie behind one another")
        self.maps = [self._map(tensor) for tensor in (keys, values)]
        if device.type == "cuda":
            gpu = torch.cuda.get_device_properties(device)
            self.blocks = min(MIN_BLOCKS, gpu.multi_processor_count)
            code = machine_code("decoder.cu", shape.defines(), (gpu.major, gpu.minor))
            self.kernel = Kernel(code, "decode_layers", THREADS)
            if self.kernel.resident() * gpu.multi_processor_count < self.blocks:
                raise CudaUnavailableError("its blocks do not fit on the GPU at once")

    def _map(self, first: Tensor) -> bytes:
        rows, box = self.cache_rows * len(self.layers), min(UNIT, self.shape.block)
        if first.device.type == "cuda":
            return tensor_map(first, rows, self.shape.dim, box)
        return _emulated_map(first, self.shape.dim, rows, box)

    def step(self, stream: Tensor, positions: Tensor, slots: Tensor, lengths: Tensor, block_table: Tensor) -> Step:
        tensors = (self.addresses, stream, self.mail, positions, slots, lengths, block_table, self.counter)
        width = block_table.shape[1]
        return Step(
            *(TensorMap.from_buffer_copy(m) for m in self.maps), *(tensor.data_ptr() for tensor in tensors), width,
            splits_of(width, self.shape.block), self.cache_rows, len(stream), self.eps, self.scale * LOG2E,
        )  # fmt: skip

    def __call__(self, stream: Tensor, positions: Tensor, slots: Tensor, lengths: Tensor, block_table: Tensor) -> None:
        """The residual stream [rows, hidden] through all layers, in place; keys and values go to the cache."""
        self.kernel.launch(self.blocks, self.step(stream, positions, slots, lengths, block_table))


def _tile_map(weight: Tensor) -> bytes:
    if weight.device.type == "cuda":
        return tile_map(weight)
    return _emulated_map(weight, weight.shape[1], weight.shape[0], 8)


def _emulated_map(first: Tensor, columns: int, rows: int, box: int) -> bytes:
    """What the emulated copy engine reads (tests)."""
    return b"".join(x.to_bytes(8, "little") for x in (first.data_ptr(), columns, rows, box)) + b"\0" * 96
