"""A folder in Hugging Face's layout: config.json, tokenizer.json and weights in safetensors files.

The header of every file is checked here before the `safetensors` package maps it, so that an error names the file
and the tensor. Format (github.com/huggingface/safetensors): u64 length of the header, a JSON object
{name: {dtype, shape, data_offsets: [begin, end]}}, then the data, which the offsets cover without gap or overlap.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from liushui.errors import ModelError, WeightError
from liushui.loading import hf_folder

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from liushui.kernels.quantised import QuantisedRows

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
_MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The table of the tensors of one file, checked. Raises `ModelError` naming the file and the tensor."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise ModelError(f"{path}: not a safetensors file, or cut short: the header does not fit")
            table = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is not sound JSON: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path}: the header is not a JSON object")
    table.pop("__metadata__", None)
    entries = {name: _entry(path, name, row) for name, row in table.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(path: Path, name: str, row: object) -> Entry:
    def whole(values: object) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if not isinstance(row, dict) or not whole(row.get("shape")) or not whole(row.get("data_offsets")):
        raise WeightError(f"{path}: tensor {name!r} has no sound shape and data_offsets")
    dtype, shape, offsets = row.get("dtype"), tuple(row["shape"]), row["data_offsets"]
    if dtype not in _BITS:
        raise WeightError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which is not supported")
    if len(offsets) != 2 or math.prod(shape) * _BITS[dtype] // 8 != offsets[1] - offsets[0]:
        raise WeightError(f"{path}: tensor {name!r}: {dtype} {list(shape)} does not fill the bytes {offsets}")
    return Entry(dtype, shape, *offsets)


def _check_layout(path: Path, entries: Mapping[str, Entry], data_bytes: int) -> None:
    order = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
    for (before, first), (after, second) in pairwise(order):
        if second.begin != first.end:
            word = "overlaps" if second.begin < first.end else "leaves a gap after"
            raise WeightError(f"{path}: tensor {after!r} {word} {before!r}")
    if order and (order[0][1].begin != 0 or order[-1][1].end != data_bytes):
        raise WeightError(
            f"{path}: the tensors end at byte {order[-1][1].end} ({order[-1][0]!r}) of {data_bytes}: cut short, "
            "or damaged; fetch the file again"
        )


class SafetensorsCheckpoint:
    """Implements `liushui.loading.checkpoint.Checkpoint`. `load` may be called from several threads."""

    format: Literal["safetensors", "gguf"] = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = hf_folder.read_json(path / "config.json")
        method = self.config.get("quantization_config")
        if isinstance(method, dict):
            raise ModelError(
                f"{path}: quantised with {method.get('quant_method', 'an unknown method')}, which is not "
                "supported: use the model's unquantised files, or a GGUF file of it"
            )
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for file, names in self._files().items():
            header = read_header(file)
            for name in names - header.keys():
                raise WeightError(f"{file}: holds no tensor {name!r}, though the index says so")
            for name, entry in header.items():
                if name in names or name not in self._entries:
                    self._entries[name] = (file, entry)
        self._handles: dict[Path, Any] = {}

    def _files(self) -> dict[Path, set[str]]:
        """The weight files, each with the names that the index (if there is one) places in it."""
        whole = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if whole.is_file():
            return {whole: set()}
        if not index.is_file():
            found = sorted(self.path.glob("*.safetensors"))
            if len(found) == 1:
                return {found[0]: set()}
            raise ModelError(f"{self.path}: several safetensors files, and no {index.name} to say what is where")
        weight_map = hf_folder.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: there is no weight_map")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index}: tensor {name!r} lies in {file!r}, which is no file of this folder")
            files.setdefault(self.path / file, set()).add(name)
        for missing in sorted(file for file in files if not file.is_file()):
            raise ModelError(f"{missing}: is missing, though {index.name} names it; fetch the model again")
        return files

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1].shape

    def load(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        file, _ = self._entry(name)
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._handles:
                self._handles[file] = safe_open(str(file), framework="pt")
            tensor: torch.Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        return tensor.to(dtype)

    def load_rows(self, name: str) -> "QuantisedRows | None":
        """A matrix or a vector (as one row) as the file holds it, without torch; None for types of other purposes."""
        import numpy as np

        from liushui.kernels.arrays import Array
        from liushui.kernels.quantised import QuantisedRows

        file, entry = self._entry(name)
        if entry.dtype not in ("F32", "F16", "BF16") or len(entry.shape) not in (1, 2) or 0 in entry.shape:
            return None
        size = entry.end - entry.begin
        try:
            with file.open("rb") as opened:
                start = 8 + struct.unpack("<Q", opened.read(8))[0]
            packed = np.fromfile(file, dtype=np.uint8, count=size, offset=start + entry.begin)
        except (OSError, struct.error) as error:
            raise WeightError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        if packed.size != size:
            raise WeightError(f"{file}: tensor {name!r} cannot be read: the file has changed")
        shape = entry.shape[0] if len(entry.shape) == 2 else 1, entry.shape[-1]
        return QuantisedRows(Array(packed), entry.dtype, shape, lambda dtype: self.load(name, dtype))

    def _entry(self, name: str) -> tuple[Path, Entry]:
        if name not in self._entries:
            raise WeightError(f"{self.path}: there is no tensor {name!r}")
        return self._entries[name]

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return hf_folder.read_tokenizer(self.path)

    def block_types(self) -> frozenset[str]:
        return frozenset()

    def load_blocks(self, name: str) -> None:
        return None

    def tokenizer(self) -> "Tokenizer":
        return self._tokenizer

    @cached_property
    def chat_template(self) -> str | None:
        return hf_folder.chat_template(self.path)

    @cached_property
    def special(self) -> dict[str, Any]:
        return hf_folder.special_tokens(self.path, self.config, self.generation_config, self._tokenizer)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return hf_folder.read_json(self.path / "generation_config.json", required=False)

    def describe(self) -> str:
        kinds: Counter[str] = Counter()
        for _, entry in self._entries.values():
            kinds[entry.dtype] += entry.end - entry.begin
        files = {file for file, _ in self._entries.values()}
        size = sum(file.stat().st_size for file in files) / 2**20
        plural = "file" if len(files) == 1 else "files"
        kind = kinds.most_common(1)[0][0] if kinds else "without weights"
        return f"safetensors {kind}, {len(files)} {plural}, {size:.0f} MiB"
