"""Reads the header of a GGUF file: its metadata and the table of its tensors.

Layout (ggml/docs/gguf.md), little-endian, versions 2 and 3:

    "GGUF"  u32 version  u64 tensor_count  u64 kv_count
    kv_count     x { string key, u32 type, value }
    tensor_count x { string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset }
    padding to general.alignment
    tensor data: the offsets count from here

A string is a u64 length and that many bytes of UTF-8; an array is a u32 type, a u64 length and the values.

The file is somebody else's: every count, length and offset is checked against the size of the file before it
is used, and whatever does not fit raises `ModelError`. (`gguf.GGUFReader` trusts its input, and needs 4 s for a
file whose header this module reads in 0.1 s.)
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from liushui.errors import ModelError
from liushui.loading.gguf_types import TYPES, TensorType

_MAGIC = b"GGUF"
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MIN_KV_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: `shape` slowest dimension first (as in torch), `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    file_bytes: int


class _Malformed(Exception):
    """What is wrong, in a few words."""


def read_header(path: Path) -> GgufHeader:
    """The header of the file at `path`. Raises `ModelError` when the file is not a sound GGUF file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _Malformed(f"it has only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data, size).header()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _Malformed as error:
        raise ModelError(f"{path}: not a sound GGUF file: {error}. Fetch it again, or choose another file.") from error


class _Parser:
    """A cursor over the mapped file. Reads raise `_Malformed` instead of passing the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data = data
        self.size = size
        self.pos = 0

    def header(self) -> GgufHeader:
        if self.data[:4] != _MAGIC:
            raise _Malformed("it does not begin with GGUF")
        self.pos = 4
        version = self.u32("the version")
        if version not in (2, 3):
            raise _Malformed(f"version {version} is not supported (2 and 3 are; a big-endian file must be converted)")
        tensor_count, kv_count = self.u64("the tensor count"), self.u64("the metadata count")
        self.expect(kv_count * _MIN_KV_BYTES + tensor_count * _MIN_TENSOR_BYTES, "the counts")
        metadata = self.metadata(kv_count)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 30 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment must be a power of two, not {alignment!r}")
        entries = [self.tensor() for _ in range(tensor_count)]
        start = -(-self.pos // alignment) * alignment
        tensors = {entry.name: self.placed(entry, start, alignment) for entry in entries}
        if len(tensors) != len(entries):
            raise _Malformed("a tensor name occurs twice")
        _check_overlap(tensors)
        return GgufHeader(metadata, tensors, self.size)

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a metadata key")
            if key in metadata:
                raise _Malformed(f"the metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.u32(key), key)
        return metadata

    def tensor(self) -> GgufTensor:
        """One row of the table; `offset` still relative to the data section."""
        name = self.string("a tensor name")
        n_dims = self.u32(name)
        if n_dims > _MAX_DIMS:
            raise _Malformed(f"tensor {name!r} has {n_dims} dimensions (at most {_MAX_DIMS})")
        shape = tuple(reversed([self.u64(name) for _ in range(n_dims)])) or (1,)
        type_id, offset = self.u32(name), self.u64(name)
        kind = TYPES.get(type_id)
        if kind is None:
            raise _Malformed(f"tensor {name!r} has the unknown type {type_id}")
        if min(shape) < 1:
            raise _Malformed(f"tensor {name!r} has the shape {shape}")
        if shape[-1] % kind.block:
            raise _Malformed(f"tensor {name!r}: rows of {shape[-1]} are no multiple of {kind.name}'s {kind.block}")
        return GgufTensor(name, shape, kind, offset, math.prod(shape[:-1]) * kind.row_bytes(shape[-1]))

    def placed(self, entry: GgufTensor, start: int, alignment: int) -> GgufTensor:
        if entry.offset % alignment:
            raise _Malformed(f"tensor {entry.name!r} is not aligned to {alignment} bytes")
        offset = start + entry.offset
        if offset + entry.nbytes > self.size:
            raise _Malformed(
                f"tensor {entry.name!r} ends at byte {offset + entry.nbytes}, the file has {self.size} (cut short?)"
            )
        return GgufTensor(entry.name, entry.shape, entry.type, offset, entry.nbytes)

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _SCALARS:
            return self.numbers(kind, 1, key)[0]
        if kind != _ARRAY:
            raise _Malformed(f"metadata key {key!r} has the unknown type {kind}")
        item, count = self.u32(key), self.u64(key)
        if item == _STRING:
            return self.strings(count, key)
        if item in _SCALARS:
            return list(self.numbers(item, count, key))
        raise _Malformed(f"metadata key {key!r} is an array of the unsupported type {item}")

    def numbers(self, kind: int, count: int, key: str) -> tuple[Any, ...]:
        code = _SCALARS[kind]
        nbytes = struct.calcsize(f"<{code}") * count
        self.expect(nbytes, key)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.pos)
        self.pos += nbytes
        return values

    def strings(self, count: int, key: str) -> list[str]:
        """Vocabularies have 10^5 entries: the one loop here that has to be tight."""
        self.expect(8 * count, key)
        data, pos, size, length_at = self.data, self.pos, self.size, _U64.unpack_from
        values = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length_at(data, pos)[0]
                if pos > size:
                    raise _Malformed(f"{key!r} reaches past the end of the file")
                values.append(str(data[start:pos], "utf-8"))
        except struct.error as error:
            raise _Malformed(f"{key!r} reaches past the end of the file") from error
        except UnicodeDecodeError as error:
            raise _Malformed(f"entry {len(values)} of {key!r} is not UTF-8") from error
        self.pos = pos
        return values

    def string(self, what: str) -> str:
        length = self.u64(what)
        self.expect(length, what)
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise _Malformed(f"{what} is not UTF-8") from error

    def u32(self, what: str) -> int:
        self.expect(4, what)
        self.pos += 4
        return int.from_bytes(self.data[self.pos - 4 : self.pos], "little")

    def u64(self, what: str) -> int:
        self.expect(8, what)
        self.pos += 8
        return int.from_bytes(self.data[self.pos - 8 : self.pos], "little")

    def expect(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.pos:
            raise _Malformed(f"{what!r} reaches past the end of the file")


def _check_overlap(tensors: dict[str, GgufTensor]) -> None:
    for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if before.offset + before.nbytes > after.offset:
            raise _Malformed(f"tensors {before.name!r} and {after.name!r} overlap")
