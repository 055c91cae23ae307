"""A whole step of a plain decoder in one call of the native library (kernels/cpu/step.cpp).

The bits are those of the operations called one by one.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_long, c_size_t, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from liushui.kernels.arrays import Array, type_name

if TYPE_CHECKING:
    from torch import Tensor


MAX_WINDOWS = 4
"""Different attention windows that the layers of one model may have."""


PARTS = (
    "norms", "qkv product", "rotation, cache write", "attention", "merge of splits", "output product",
    "gate and up product", "activation", "down product", "head and choice",
)  # fmt: skip
"""What a step's time is spent on: `StepPart` of kernels/cpu/step.h. Preparing a product's rows counts as what made
them."""


@dataclass(frozen=True, slots=True)
class PartTime:
    """Seconds that a thread worked on one of `PARTS`, and then waited for the others, on average over the threads."""

    part: str
    worked: float
    waited: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of steps went."""

    steps: int
    rows: int
    seconds: float
    """From call to return, with what is in no part: threads that wake up, plans."""
    parts: tuple[PartTime, ...]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer. Products are addresses of `PackedWeight` (kernels/cpu/linear.h); norms in the arithmetic type."""

    qkv: int
    output: int
    gate_up: int
    down: int
    attention_norm: Tensor
    attention_eps: float
    mlp_norm: Tensor
    mlp_eps: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    head_eps: float
    rope: Tensor
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A decoder without its embedding."""

    dtype: str
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: Sequence[LayerParts]
    norm: Tensor
    norm_eps: float
    head: int
    residual_scale: float = 1.0
    """Of what a sub-layer adds to the stream."""
    logits_divisor: float = 1.0


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("qkv", "output", "gate_up", "down", "attention_norm", "mlp_norm")],
        *[(name, c_void_p) for name in ("q_norm", "k_norm", "rope", "k_cache", "v_cache", "k_scales", "v_scales")],
        ("max_position", c_int64),
        *[(name, c_int32) for name in ("rotary", "window")],
        *[(name, c_float) for name in ("scale", "attention_eps", "mlp_eps", "head_eps")],
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("layers", "norm", "head")],
        *[(name, c_int64) for name in ("hidden", "inner", "num_blocks")],
        *[(name, c_int32) for name in ("type", "num_layers", "num_heads", "num_kv_heads", "head_dim", "block_size")],
        *[(name, c_float) for name in ("norm_eps", "residual_scale", "logits_divisor")],
    ]


class StepBatch(ctypes.Structure):
    """Of step.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("x", "positions", "slots", "query_start", "seq_lens", "block_table")],
        *[(name, c_void_p) for name in ("wanted", "hidden", "tokens", "memory")],
        *[(name, c_int64) for name in ("rows", "num_wanted", "num_tokens")],
        *[(name, c_int32) for name in ("num_sequences", "max_blocks")],
        ("times", c_void_p),
    ]


class NativeStep:
    """All layers of one decoder over one KV cache, on `threads` threads."""

    def __init__(
        self,
        library: ctypes.CDLL,
        isa: str,
        threads: int,
        parts: DecoderParts,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """keys, values [num_layers, num_blocks, kv_heads, block_size, head_dim]; the scales of int8 ones
        [num_layers, num_blocks, kv_heads, block_size]."""
        _check(keys, parts.dtype if scales is None else "int8", len(parts.layers), *keys.shape[1:])
        _check(values, type_name(keys.dtype), *keys.shape)
        for scale in scales or ():
            _check(scale, "float32", *keys.shape[:-1])
        self._run, self._bytes = library[f"liushui_step_{isa}"], library[f"liushui_step_bytes_{isa}"]
        self._run.argtypes, self._run.restype = [c_int, POINTER(_Model), POINTER(StepBatch)], c_int
        self._bytes.argtypes, self._bytes.restype = [POINTER(_Model), c_long, c_long, c_int], c_size_t
        self.threads, self.parts, self.block_size = threads, parts, int(keys.shape[3])
        self._kept = (keys, values, scales)  # what the structures point into
        caches = [keys, values, *(scales or ())]
        self._layers = (_Layer * len(parts.layers))(
            *(_layer(part, [cache[i].data_ptr() for cache in caches]) for i, part in enumerate(parts.layers))
        )
        self._model = _Model(
            layers=ctypes.addressof(self._layers), norm=parts.norm.data_ptr(), head=parts.head, hidden=parts.hidden,
            inner=parts.inner, num_blocks=keys.shape[1], type=int(parts.dtype == "bfloat16"),
            num_layers=len(parts.layers), num_heads=parts.num_heads, num_kv_heads=parts.num_kv_heads,
            head_dim=parts.head_dim, block_size=self.block_size, norm_eps=parts.norm_eps,
            residual_scale=parts.residual_scale, logits_divisor=parts.logits_divisor,
        )  # fmt: skip
        self._at_model = byref(self._model)
        self._batch = StepBatch()
        self._batches = [self._batch]
        self._capacity = (0, 0)
        self._memory = Array.empty((0,), "uint8")
        self._tokens = Array.empty((0,), "int32")
        self._times: np.ndarray | None = None
        self._watched = (0, 0, 0.0)

    def watch(self) -> None:
        """Measure every step from now on, from zero: some clock readings a layer for each thread."""
        self._times = np.zeros((self.threads, len(PARTS), 2), np.int64)
        for batch in self._batches:
            batch.times = self._times.ctypes.data
        self._watched = (0, 0, 0.0)

    def times(self) -> StepTimes:
        """What was measured since `watch`; nothing without it."""
        seconds = np.zeros((len(PARTS), 2)) if self._times is None else self._times.mean(axis=0) / 1e9
        parts = zip(PARTS, seconds.tolist(), strict=True)
        return StepTimes(*self._watched, tuple(PartTime(part, *times) for part, times in parts))

    def reserve(self, rows: int, num_tokens: int) -> None:
        """Work space for steps of up to `rows` rows that choose up to `num_tokens` tokens."""
        if rows <= self._capacity[0] and num_tokens <= self._capacity[1]:
            return
        rows, num_tokens = max(rows, self._capacity[0]), max(num_tokens, self._capacity[1])
        size = self._bytes(byref(self._model), rows, num_tokens, self.threads)
        self._memory, self._tokens = Array.empty((size + 63,), "uint8"), Array.empty((num_tokens,), "int32")
        start = self._memory.data_ptr()
        for batch in self._batches:
            batch.memory = start + -start % 64
        self._batch.tokens = self._tokens.data_ptr()
        self._capacity = rows, num_tokens

    def new_batch(self) -> StepBatch:
        """An empty batch, to be given to `run`, that knows its work space now and after each `reserve`."""
        self._batches.append(StepBatch(memory=self._batch.memory, times=self._batch.times))
        return self._batches[-1]

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        wanted: Tensor,
        num_tokens: int,
    ) -> tuple[Tensor, list[int]]:
        """x [T, H], the embedded tokens, is overwritten; the others as in `Ops`; wanted [R] int32: rows.

        Returns the hidden states [R, H] of the wanted rows after the last norm, and the most likely token of each of
        the first `num_tokens` of them (the smallest of equals; -1 where the logits are not finite). Raises
        `IndexError` for indices out of range.
        """
        rows, batch = x.shape[0], self._batch
        self.reserve(rows, num_tokens)
        _check(x, self.parts.dtype, rows, self.parts.hidden)
        _check(positions, "int32", rows)
        _check(slots, "int32", rows)
        sequences, max_blocks = block_table.shape
        _check(query_start, "int32", sequences + 1)
        _check(seq_lens, "int32", sequences)
        _check(block_table, "int32", sequences, max_blocks)
        _check(wanted, "int32", wanted.numel())
        hidden = x.new_empty((wanted.numel(), self.parts.hidden))
        batch.x, batch.positions, batch.slots = x.data_ptr(), positions.data_ptr(), slots.data_ptr()
        batch.query_start, batch.seq_lens = query_start.data_ptr(), seq_lens.data_ptr()
        batch.block_table, batch.wanted, batch.hidden = block_table.data_ptr(), wanted.data_ptr(), hidden.data_ptr()
        batch.rows, batch.num_wanted, batch.num_tokens = rows, wanted.numel(), num_tokens
        batch.num_sequences, batch.max_blocks = sequences, max_blocks
        self.run(byref(batch), rows)
        return hidden, self._tokens.values[:num_tokens].tolist()

    def run(self, batch: Any, rows: int) -> None:
        """The step itself. `batch`: byref of a `StepBatch` that has `rows` rows. Raises `IndexError`."""
        if self._times is None:
            wrong = self._run(self.threads, self._at_model, batch)
        else:
            start = time.perf_counter()
            wrong = self._run(self.threads, self._at_model, batch)
            steps, total, seconds = self._watched
            self._watched = steps + 1, total + rows, seconds + time.perf_counter() - start
        if wrong:
            raise IndexError("step: rows, positions, slots or blocks point outside the batch, the tables or the cache")


def _check(x: Tensor, dtype: str, *shape: int) -> None:
    if type_name(x.dtype) != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"step: {list(x.shape)} {x.dtype} where contiguous {list(shape)} {dtype} is needed")


def _layer(part: LayerParts, caches: list[int]) -> _Layer:
    def address(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    places = dict(zip(("k_cache", "v_cache", "k_scales", "v_scales"), caches, strict=False))
    return _Layer(
        qkv=part.qkv, output=part.output, gate_up=part.gate_up, down=part.down,
        attention_norm=part.attention_norm.data_ptr(), mlp_norm=part.mlp_norm.data_ptr(), q_norm=address(part.q_norm),
        k_norm=address(part.k_norm), rope=part.rope.data_ptr(), max_position=part.rope.shape[0],
        rotary=part.rope.shape[1], window=part.window or 0, scale=part.scale, attention_eps=part.attention_eps,
        mlp_eps=part.mlp_eps, head_eps=part.head_eps, **places,
    )  # fmt: skip


def fits(parts: DecoderParts) -> bool:
    """Whether `NativeStep` can run it."""
    windows = {layer.window for layer in parts.layers}
    norms: list[Any] = [parts.norm]
    for layer in parts.layers:
        norms += [
            norm for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm) if norm is not None
        ]
    typed = all(type_name(norm.dtype) == parts.dtype and norm.is_contiguous() for norm in norms)
    rope = all(type_name(layer.rope.dtype) == "float32" and layer.rope.is_contiguous() for layer in parts.layers)
    return typed and rope and len(windows) <= MAX_WINDOWS and parts.num_heads % parts.num_kv_heads == 0
