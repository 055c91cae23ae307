"""A GGUF file as a checkpoint: Hugging Face's names and layout, values dequantised.

The tensors are read, not mapped: a file that shrinks while it is in use gives an error and not a crash.
"""

from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from liushui.errors import ModelError, WeightError
from liushui.loading import gguf_names
from liushui.loading.gguf_header import GgufTensor, read_header
from liushui.loading.gguf_names import Layout

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from liushui.kernels.quantised import Quantised, QuantisedRows

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "mirostat": "mirostat",
    "xtc_probability": "xtc_probability",
}


class GgufCheckpoint:
    """Implements `liushui.loading.checkpoint.Checkpoint`. `load` may be called from several threads."""

    format: Literal["safetensors", "gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.metadata = header.metadata
        self._file_bytes = header.file_bytes
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        try:
            self.config: dict[str, Any] = gguf_names.config(header.metadata, shapes)
            arch = header.metadata["general.architecture"]
            self._tensors: dict[str, tuple[GgufTensor, Layout]] = {}
            for name, tensor in header.tensors.items():
                if name in gguf_names.LONGROPE_FACTORS and "rope_scaling" in self.config:
                    self._take_longrope(gguf_names.LONGROPE_FACTORS[name], tensor)
                    continue
                target = gguf_names.target(arch, name)
                if target.layout is Layout.TRANSPOSED and len(tensor.shape) != 2:
                    raise WeightError(f"tensor {name!r} must be a matrix, got {list(tensor.shape)}")
                if target.layout is Layout.EXPERTS:
                    self._tensors |= {
                        target.name.format(i): (part, Layout.SAME) for i, part in enumerate(_experts(tensor))
                    }
                else:
                    self._tensors[target.name] = (tensor, target.layout)
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from error

    def _take_longrope(self, key: str, tensor: GgufTensor) -> None:
        """Phi-3's factors, at home in config.json."""
        import torch

        from liushui.loading.gguf_quants import dequantise

        factors = dequantise(self._read(tensor), tensor.type, torch.float32, tensor.name)
        self.config["rope_scaling"][key] = factors.flatten().tolist()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        tensor, layout = self._entry(name)
        return tensor.shape[::-1] if layout is Layout.TRANSPOSED else tensor.shape

    def load(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        tensor, layout = self._entry(name)
        from liushui.loading.gguf_quants import dequantise

        packed = self._read(tensor)
        if layout is Layout.ROTARY:
            packed = self._unpermuted(packed, tensor)
        if layout is Layout.FROM_ONE:
            import torch

            factors = dequantise(packed, tensor.type, torch.float32, tensor.name).reshape(tensor.shape)
            return (factors - 1.0).to(dtype)
        values = dequantise(packed, tensor.type, dtype, tensor.name).reshape(tensor.shape)
        return values.t().contiguous() if layout is Layout.TRANSPOSED else values

    def block_types(self) -> frozenset[str]:
        """The quantised types of the matrices that `load_blocks` gives."""
        found = (self._tensors[name] for name in self._tensors if self._in_blocks(name))
        return frozenset(tensor.type.name for tensor, _ in found)

    def load_blocks(self, name: str) -> "Quantised | None":
        """A matrix of a quantised type as the file holds it, rows in `load`'s order; None for all other tensors."""
        found = self.load_rows(name) if self._in_blocks(name) else None
        if found is None:
            return None
        from liushui.kernels.quantised import Quantised

        rows: Any = found.rows
        return Quantised((replace(found, rows=rows.tensor()),))

    def load_rows(self, name: str) -> "QuantisedRows | None":
        """A matrix or a vector (as one row) of any type as the file holds it, rows in `load`'s order, without torch;
        None where the file holds other values or another order."""
        from liushui.kernels.arrays import Array
        from liushui.kernels.quantised import QuantisedRows

        tensor, layout = self._entry(name)
        if len(tensor.shape) > 2 or layout not in (Layout.SAME, Layout.ROTARY):
            return None
        packed = self._read(tensor)
        if layout is Layout.ROTARY:
            packed = self._unpermuted(packed, tensor)

        def values(dtype: "torch.dtype") -> "torch.Tensor":
            from liushui.loading.gguf_quants import dequantise

            return dequantise(packed, tensor.type, dtype, tensor.name).reshape(tensor.shape)

        shape = tensor.shape[0] if len(tensor.shape) == 2 else 1, tensor.shape[-1]
        return QuantisedRows(Array(packed), tensor.type.name, shape, values)

    def _in_blocks(self, name: str) -> bool:
        tensor, layout = self._entry(name)
        return len(tensor.shape) == 2 and tensor.type.block > 1 and layout in (Layout.SAME, Layout.ROTARY)

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from liushui.loading.gguf_tokenizer import build_tokenizer

        try:
            return build_tokenizer(self.metadata)
        except ModelError as error:
            raise type(error)(f"{self.path}: {error}") from error

    def tokenizer(self) -> "Tokenizer":
        return self._tokenizer

    @property
    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template else None

    @cached_property
    def special(self) -> dict[str, Any]:
        from liushui.loading.gguf_tokenizer import adds_bos

        special: dict[str, Any] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            index = self._token_id(key)
            special[f"{name}_token"] = None if index is None else self._tokens[index]
        ends = [self._token_id(key) for key in ("eos", "eot", "eom")]
        special["bos_token_id"] = self._token_id("bos")
        special["eos_token_ids"] = list(dict.fromkeys(end for end in ends if end is not None))
        special["add_bos"] = adds_bos(self.metadata) and special["bos_token_id"] is not None
        return special

    @property
    def generation_config(self) -> dict[str, Any]:
        """Sampling defaults, where the file recommends any, under Hugging Face's names."""
        values = self.metadata
        return {
            name: values[f"general.sampling.{key}"]
            for key, name in _SAMPLING.items()
            if isinstance(values.get(f"general.sampling.{key}"), int | float)
        }

    def describe(self) -> str:
        """One line: the quantisation of most weights, and the size of the file."""
        elements: Counter[str] = Counter()
        for tensor, _ in self._tensors.values():
            elements[tensor.type.name] += tensor.nbytes // tensor.type.nbytes * tensor.type.block
        kind = elements.most_common(1)[0][0]
        return f"GGUF {kind}, {self._file_bytes / 2**20:.0f} MiB"

    @property
    def _tokens(self) -> list[str]:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens if isinstance(tokens, list) else []

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        index = self.metadata.get(key)
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self._tokens):
            raise ModelError(f"{self.path}: GGUF metadata {key!r} names no token: {index!r}")
        return index

    def _entry(self, name: str) -> tuple[GgufTensor, Layout]:
        if name not in self._tensors:
            raise WeightError(f"{self.path}: there is no tensor {name!r}")
        return self._tensors[name]

    def _read(self, tensor: GgufTensor) -> Any:
        """The packed rows: uint8 [rows, bytes of a row]; a vector is one row."""
        import numpy as np

        try:
            packed = np.fromfile(self.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if packed.size != tensor.nbytes:
            raise WeightError(f"{self.path}: ends inside tensor {tensor.name!r}: the file has changed")
        return packed.reshape(-1 if len(tensor.shape) > 1 else 1, tensor.type.row_bytes(tensor.shape[-1]))

    def _unpermuted(self, packed: Any, tensor: GgufTensor) -> Any:
        """Rows (2 i, 2 i + 1) of each head -> rows (i, i + head_dim / 2): rotary halves as in Hugging Face.

        Whole rows move, so this is done before they are dequantised, when they are smallest.
        """
        is_query = ".attn_q." in tensor.name
        heads = self.config["num_attention_heads" if is_query else "num_key_value_heads"]
        rows = tensor.shape[0]
        if rows != heads * self.config["head_dim"] or self.config["head_dim"] % 2:
            raise WeightError(f"tensor {tensor.name!r} has {rows} rows, not {heads} heads of {self.config['head_dim']}")
        bias = len(tensor.shape) == 1
        if bias and tensor.type.block > 1:
            raise WeightError(f"tensor {tensor.name!r} is a quantised bias: not supported")
        pairs = packed.reshape(heads, rows // heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(1 if bias else rows, -1)


def _experts(tensor: GgufTensor) -> list[GgufTensor]:
    """A tensor [experts, rows, columns], whose experts lie one after the other, as a tensor for each."""
    if len(tensor.shape) != 3:
        raise WeightError(f"tensor {tensor.name!r} must hold a matrix for each expert, got {list(tensor.shape)}")
    count, size = tensor.shape[0], tensor.nbytes // tensor.shape[0]
    return [replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * size, nbytes=size) for i in range(count)]
