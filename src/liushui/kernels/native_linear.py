"""The native products: weights packed once, then x @ weight.T + bias with an order of sums that ignores the batch.

Integer weights (int8, 4 bits, and GGUF's blocks) stay as they are in memory. x is rounded to 16 bits in groups of 32,
by itself for each row; a group's sum is exact, and groups are added in order. With AMX they can be held to be
multiplied as bfloat16 instead: the product then has the bits of bfloat16 weights, and reads fewer bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int32, c_int64, c_long, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liushui.kernels.arrays import Arena, Array, type_name
from liushui.kernels.ops import PackedLinear
from liushui.kernels.quantised import AS_BFLOAT16, Quantised, QuantisedRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int4+min": 4, "int4 K": 5, "int6 K": 6}
"""`WeightFormat` in linear.h."""
FORMATS |= {name + AS_BFLOAT16: 16 + number for name, number in FORMATS.items() if number >= FORMATS["int8"]}
SOURCES = {
    "F32": (0, "float32", 1, 4),
    "BF16": (1, "bfloat16", 1, 2),
    "Q8_0": (2, "int8", 32, 34),
    "Q4_0": (3, "int4", 32, 18),
    "Q4_1": (4, "int4+min", 32, 20),
    "Q4_K": (5, "int4 K", 256, 144),
    "Q6_K": (6, "int6 K", 256, 210),
    "Q5_0": (7, "int8", 32, 22),
}
"""What a weight is packed from: its number in quant_pack.h, the format it is held in as it comes, and the elements and
bytes of a block."""
UNPACKED = {"F16": (16, 1, 2), "Q5_1": (17, 32, 24), "Q5_K": (18, 256, 176)}
"""Types that are only unpacked: number in unpack.h, elements and bytes of a block."""
BLOCK_TYPES = frozenset(SOURCES) - {"F32", "BF16"}
"""GGUF's quantised types that are held as they are."""
_TYPES = {"float32": 0, "bfloat16": 1}
_STORE, _ADD = 0, 1
_ALIGNMENT = 64


class Record(ctypes.Structure):
    """`PackedWeight` in linear.h."""

    _fields_ = (
        ("format", c_int32),
        ("reserved", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
        ("next", c_void_p),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLinear(PackedLinear):
    """A weight as the native products read it: the memory is `data`, and that of `others` further rows."""

    records: tuple[Record, ...]
    """One for each format, linked; the first is what the library is given."""
    others: tuple[Tensor, ...]
    bias: Tensor | None
    """The bias, float32 [N], that the records point to."""

    @property
    def address(self) -> int:
        """Of the first `PackedWeight`."""
        return ctypes.addressof(self.records[0])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(other.nbytes for other in self.others)


_ARGUMENTS: dict[str, list[Any]] = {
    "weight_bytes": [c_void_p],
    "pack": [c_int, c_void_p, c_int, c_void_p, c_void_p],
    "product": [c_int, c_void_p, c_void_p, c_int, c_long, c_void_p, c_int, c_int, c_long],
    "unpack": [c_int, c_int, c_void_p, c_long, c_long, c_void_p, c_int],
    "embed": [c_int, c_void_p, c_void_p, c_long, c_void_p, c_int, c_long],
}


class NativeProducts:
    """Packing and products of one instruction set. Wrong types or shapes raise `ValueError`."""

    def __init__(self, library: ctypes.CDLL, isa: str, threads: int) -> None:
        functions = {}
        for name, arguments in _ARGUMENTS.items():
            function = library[f"liushui_{name}_{isa}"]  # an own object, not the shared attribute
            function.argtypes, function.restype = arguments, c_int64 if name == "weight_bytes" else c_int
            functions[name] = function
        self._weight_bytes, self._pack = functions["weight_bytes"], functions["pack"]
        self._product, self._embed = functions["product"], functions["embed"]
        self._unpack = functions["unpack"]
        self.threads = threads
        self._arena = Arena()
        self._layout = f"native {isa}"

    def pack(self, weight: Tensor | Quantised, bias: Tensor | None = None, form: str | None = None) -> NativeLinear:
        """weight [N, K] in float32 or bfloat16, or GGUF blocks; `form`: int8 or int4, to quantise float32, and behind
        it, or alone, `AS_BFLOAT16`."""
        if isinstance(weight, Quantised):
            form = form or weight.form
        stacked = weight.parts if isinstance(weight, Quantised) else (_Part.of(weight),)
        packed = [self._pack_part(part.rows, part.kind, part.shape, form) for part in stacked]
        records, memory = [record for record, _ in packed], [memory for _, memory in packed]
        dtype = "float32" if isinstance(weight, Quantised) else weight.dtype
        return self._linked(records, memory, bias, dtype)

    def _linked(self, records: list[Record], memory: Sequence[Tensor], bias: Tensor | None, dtype: Any) -> NativeLinear:
        outputs, begin = sum(int(record.n) for record in records), 0
        if bias is not None:
            if bias.numel() != outputs:
                raise ValueError("linear: bias is not [N]")
            bias = bias.float().contiguous()
        for record, following in zip(records, [*records[1:], None], strict=True):
            record.next = None if following is None else ctypes.addressof(following)
            record.bias = None if bias is None else bias.data_ptr() + 4 * begin
            begin += int(record.n)
        names = {number: name for name, number in FORMATS.items()}
        kind = f"{self._layout}: " + ", ".join(dict.fromkeys(names[record.format] for record in records))
        return NativeLinear(
            memory[0], outputs, int(records[0].k), dtype, kind, bias is not None,
            records=tuple(records), others=tuple(memory[1:]), bias=bias,
        )  # fmt: skip

    def with_bias(self, packed: NativeLinear, bias: Tensor) -> NativeLinear:
        """The same memory with another bias."""
        records = [Record.from_buffer_copy(record) for record in packed.records]
        return self._linked(records, [packed.data, *packed.others], bias, packed.dtype)

    def _pack_part(
        self, rows: Tensor | Array, kind: str, shape: tuple[int, int], form: str | None
    ) -> tuple[Record, Tensor]:
        source, held, block, nbytes = _source(kind)
        if form is None and held is None:
            raise ValueError(f"native kernels have no product for {kind}")
        if not rows.is_contiguous():
            raise ValueError("native kernels take contiguous tensors")
        if shape[1] % block or rows.nbytes != shape[0] * (shape[1] // block) * nbytes:
            raise ValueError(f"pack_linear: {rows.nbytes} bytes of {kind} are not {list(shape)}")
        if form == AS_BFLOAT16:
            form = (held or "") + AS_BFLOAT16
        record = Record(format=FORMATS[form or held or ""], n=shape[0], k=shape[1])
        size = self._weight_bytes(ctypes.addressof(record))
        if size < 0:
            raise ValueError(f"pack_linear: a weight of {list(shape)} cannot be held as {form or held}")
        memory: Any
        if isinstance(rows, Array):
            memory = self._arena.take(size)
        else:
            import torch

            memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % _ALIGNMENT
        record.data = memory.data_ptr() + start
        if self._pack(self.threads, ctypes.addressof(record), source, rows.data_ptr(), record.data):
            raise ValueError(f"pack_linear: {kind} cannot become {form or held}")
        return record, memory

    def unpack(self, part: QuantisedRows, dtype: str) -> Array:
        """The values of rows in memory, float32 or bfloat16 [N, K], as GGUF's reference computes them."""
        source, _, block, nbytes = _source(part.kind)
        rows, columns = part.shape
        if not part.rows.is_contiguous() or columns % block or part.rows.nbytes != rows * (columns // block) * nbytes:
            raise ValueError(f"unpack: {part.rows.nbytes} bytes of {part.kind} are not {list(part.shape)}")
        out = Array.empty(part.shape, dtype)
        self._unpack(self.threads, source, part.rows.data_ptr(), rows, columns, out.data_ptr(), _TYPES[dtype])
        return out

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N]. A `bias` replaces the one that was packed."""
        known = self._known(packed)
        bound = known if bias is None else self.with_bias(known, bias)
        self._check_rows(x, known)
        rows, width = x.shape[0], packed.out_features
        out = x.new_empty((rows, width))
        kind = _TYPES[type_name(x.dtype)]
        self._product(self.threads, bound.address, x.data_ptr(), kind, rows, out.data_ptr(), kind, _STORE, width)
        return out

    def embed(self, ids: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] of the weight in `dtype`, [T, K]."""
        record = self._known(packed).address
        shape = ids.numel(), packed.in_features
        out: Tensor
        if isinstance(ids, Array):
            out = Array.empty(shape, type_name(dtype))
        else:
            import torch

            ids = ids.to(torch.int64).contiguous()
            out = torch.empty(shape, dtype=dtype)
        wrong = self._embed(
            self.threads,
            record,
            ids.data_ptr(),
            ids.numel(),
            out.data_ptr(),
            _TYPES[type_name(dtype)],
            packed.in_features,
        )
        if wrong:
            raise IndexError("embed: an id is outside the table")
        return out

    def embedding(self, packed: PackedLinear, dtype: str, ids: int, out: int) -> Callable[[int], None]:
        """A function of T that does what `embed` does in memory that stays: from the T ids, int64, at address `ids` to
        the rows [T, K] at `out`."""
        record, kind, width = c_void_p(self._known(packed).address), _TYPES[dtype], packed.in_features
        embed, threads, source, target = self._embed, self.threads, c_void_p(ids), c_void_p(out)

        def run(count: int) -> None:
            if embed(threads, record, source, count, target, kind, width):
                raise IndexError("embed: an id is outside the table")

        return run

    def _known(self, packed: PackedLinear) -> NativeLinear:
        if not isinstance(packed, NativeLinear) or not packed.kind.startswith(self._layout):
            raise ValueError(f"linear: packed as {packed.kind}, not {self._layout}")
        return packed

    def _check_rows(self, x: Tensor, packed: NativeLinear) -> None:
        kind = type_name(x.dtype)
        taken = {0: "float32"}.get(packed.records[0].format, kind if packed.records[0].format < 16 else "bfloat16")
        if kind not in _TYPES or kind != taken:
            raise ValueError(f"native kernels take one type: {packed.kind} cannot take {x.dtype}")
        if x.dim() != 2 or x.shape[1] != packed.in_features:
            raise ValueError("linear: x is not [M, K]")
        if not x.is_contiguous():
            raise ValueError("native kernels take contiguous tensors")


def can_unpack(kind: str) -> bool:
    """Whether the library knows GGUF's type `kind`."""
    return kind in SOURCES or kind in UNPACKED


def _source(kind: str) -> tuple[int, str | None, int, int]:
    """Number, the format it is held in as it comes (if any), elements and bytes of a block."""
    if kind in SOURCES:
        return SOURCES[kind]
    if kind not in UNPACKED:
        raise ValueError(f"native kernels have no product for {kind}")
    number, elements, nbytes = UNPACKED[kind]
    return number, None, elements, nbytes


@dataclass(frozen=True, slots=True)
class _Part:
    rows: Tensor
    kind: str
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor) -> _Part:
        kinds = {"float32": "F32", "bfloat16": "BF16"}
        kind = kinds.get(type_name(weight.dtype))
        if kind is None:
            raise ValueError(f"native kernels take float32 or bfloat16, not {weight.dtype}")
        return cls(weight, kind, (weight.shape[0], weight.shape[1]))
