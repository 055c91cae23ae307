"""The operations in C++ (kernels/cpu), called with raw pointers through ctypes.

Each output element is formed by one thread in one order of operations, whatever the batch, so the promise of `Ops`
holds by construction.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int, c_long, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liushui.errors import ParameterError
from liushui.kernels.arrays import type_name
from liushui.kernels.native_decode import NativeDecode
from liushui.kernels.native_linear import BLOCK_TYPES, NativeProducts
from liushui.kernels.native_step import DecoderParts, NativeStep, fits
from liushui.kernels.ops import PackedLinear
from liushui.kernels.quantised import Quantised

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "generic")
"""Best first."""
MAX_HEAD_DIM = 1024
_TYPES = {"float32": 0, "bfloat16": 1}
_SILU_MUL, _GELU_TANH_MUL, _GELU_TANH = range(3)
_ARGUMENTS: dict[str, list[Any]] = {
    "norm": [c_int, c_int, *[c_void_p] * 5, c_long, c_long, c_float, c_float, c_int],
    "activation": [c_int, c_int, c_int, c_void_p, c_void_p, c_long, c_long],
    "to_cache": [
        *[c_int] * 2, c_void_p, *[c_int] * 3, c_void_p, c_void_p, c_long, *[c_void_p] * 4, c_long, c_int,
        c_void_p, c_long, c_int, c_void_p, c_void_p, c_float,
    ],
    "attention": [
        *[c_int] * 2, c_void_p, c_long, c_void_p, c_long, *[c_int] * 3, *[c_void_p] * 4, c_long, c_int,
        c_void_p, c_void_p, c_void_p, c_int, c_int, c_float, c_int,
    ],
}  # fmt: skip


class NativeUnavailableError(Exception):
    """Why the native library cannot serve, in words for the user."""


@cache
def _library() -> ctypes.CDLL:
    """The library. Raises `NativeUnavailableError`."""
    folder = Path(__file__).parent
    found = [path for path in (folder / "_cpu.so", folder / "_cpu.dylib") if path.exists()]
    if not found:
        reason = folder / "_cpu.reason"
        why = reason.read_text(encoding="utf-8").strip() if reason.exists() else "the package was not installed by pip"
        raise NativeUnavailableError(f"not built ({why})")
    return open_library(found[0])


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises `NativeUnavailableError`."""
    try:
        library = ctypes.CDLL(str(path))
        library.liushui_supports.argtypes = [c_char_p]
        library.liushui_use_huge_pages.argtypes = [c_void_p, c_size_t]
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"cannot be loaded ({error})") from None
    library.liushui_use_openmp.argtypes = [c_void_p]
    return library


def _torch_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself uses, if it has one."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            loaded = ctypes.CDLL(str(folder / name), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            # A search from torch's library goes through what it was linked with.
            return ctypes.cast(loaded.GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


class NativeOps:
    """See `Ops`."""

    name = "native"
    block_types = BLOCK_TYPES

    def __init__(self, threads: int, isa: str | None = None) -> None:
        library = _library()
        usable = [name for name in INSTRUCTION_SETS if library.liushui_supports(name.encode())]
        usable = [name for name in usable if hasattr(library, f"liushui_unpack_{name}")]
        if not usable:
            raise NativeUnavailableError("built for another processor, or from older sources")
        if isa is not None and isa not in usable:
            raise ParameterError("isa", f"{isa} is not among what this machine and build have: {', '.join(usable)}")
        self.isa = isa or usable[0]
        self.threads = threads
        self.note = f"native kernels: {self.isa}, {threads} thread{'s' if threads > 1 else ''}"
        functions = {name: self._function(library, name) for name in _ARGUMENTS}
        self._norm, self._activation = functions["norm"], functions["activation"]
        self._to_cache, self._attention = functions["to_cache"], functions["attention"]
        self.products = NativeProducts(library, self.isa, threads)

    @staticmethod
    def share_threads(*, with_torch: bool) -> None:
        """Whether operations called one by one run on torch's threads, in this process, from now on.

        For models part of whose work is torch's own, so that two pools do not fight for the same cores.
        """
        _library().liushui_use_openmp(_torch_openmp() if with_torch else None)

    @staticmethod
    def use_huge_pages(memory: Tensor) -> None:
        """Ask for large pages behind `memory`, not yet written: blocks of keys are read here and there, and each
        ordinary page that the processor does not know costs it as much as the reading."""
        _library().liushui_use_huge_pages(memory.data_ptr(), memory.nbytes)

    def step(
        self, parts: DecoderParts, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None = None
    ) -> NativeStep | None:
        """All layers of a decoder in one call; None where a step cannot run it.

        keys, values [num_layers, num_blocks, Hk, block_size, D]; scales [num_layers, num_blocks, Hk, block_size].
        """
        return NativeStep(_library(), self.isa, self.threads, parts, keys, values, scales) if fits(parts) else None

    def decode(self, step: NativeStep, table: PackedLinear, dtype: torch.dtype) -> NativeDecode | None:
        """The same for sequences that are fed one token each, whose rows are those of `table` in `dtype`; None where
        the step takes another type."""
        return NativeDecode(step, self.products, table) if type_name(dtype) == step.parts.dtype else None

    def _function(self, library: ctypes.CDLL, name: str) -> Any:
        function = library[f"liushui_{name}_{self.isa}"]  # an own object, not the shared attribute
        function.argtypes = _ARGUMENTS[name]
        function.restype = c_int
        return function

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
    ) -> Tensor:
        return self._run_norm(x, weight, None, eps, residual, 1.0 if unit_offset else 0.0)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        return self._run_norm(x, weight, bias, eps, residual, 0.0)

    def _run_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, offset: float
    ) -> Tensor:
        kind = _type_of(x, weight, bias, residual)
        rows, width = x.shape
        _check(weight.numel() == width and (bias is None or bias.numel() == width), "norm: weight is not [H]")
        _check(residual is None or residual.shape == x.shape, "norm: residual is not [T, H]")
        out = x.new_empty(x.shape)
        self._norm(
            kind, self.threads, x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(residual), out.data_ptr(),
            rows, width, eps, offset, bias is not None,
        )  # fmt: skip
        return out

    def qkv_to_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rope: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """See `Ops`. With `scales` of keys and values [num_blocks, Hk, block_size] float32 the caches are int8: a
        head's key is written as round(k / scale) with scale = max |k| / 127."""
        kind = _type_of(qkv, q_norm, k_norm)
        tokens, width = qkv.shape
        blocks, block_size = _check_heads(width, num_heads, num_kv_heads, head_dim, k_cache, v_cache)
        k_scales, v_scales = _check_cache(qkv.dtype, k_cache, v_cache, scales)
        _check_indices(positions, slots)
        right = positions.numel() == tokens == slots.numel()
        _check(right, "qkv_to_cache: positions and slots are not [T]")
        for norm in (q_norm, k_norm):
            _check(norm is None or norm.numel() == head_dim, "qkv_to_cache: head norm is not [D]")
        max_position, rotary = 0, 0
        if rope is not None:
            max_position, rotary = rope.shape
            right = (
                type_name(rope.dtype) == "float32" and rope.is_contiguous() and rotary % 2 == 0 and rotary <= head_dim
            )
            _check(right, "qkv_to_cache: rope is not float32 [max_position, R] with an even R <= D")
        wrong = self._to_cache(
            kind, self.threads, qkv.data_ptr(), num_heads, num_kv_heads, head_dim, positions.data_ptr(),
            slots.data_ptr(), tokens, k_cache.data_ptr(), v_cache.data_ptr(), k_scales, v_scales, blocks, block_size,
            _pointer(rope), max_position, rotary, _pointer(q_norm), _pointer(k_norm), eps,
        )  # fmt: skip
        if wrong:
            raise IndexError("qkv_to_cache: a slot is outside the cache or a position outside the rope table")

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_cache: Tensor,
        v_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `Ops`; `scales` as in `qkv_to_cache`."""
        kind = _type_of(qkv)
        rows, width = qkv.shape
        blocks, block_size = _check_heads(width, num_heads, num_kv_heads, head_dim, k_cache, v_cache)
        k_scales, v_scales = _check_cache(qkv.dtype, k_cache, v_cache, scales)
        _check_indices(query_start, seq_lens, block_table)
        sequences, max_blocks = block_table.shape
        right = query_start.numel() == sequences + 1 and seq_lens.numel() == sequences
        _check(right, "attention: query_start is not [S + 1] or seq_lens not [S]")
        _check(window is None or window > 0, "attention: window is not positive")
        out = qkv.new_empty((rows, num_heads * head_dim))
        if rows == 0:
            return out
        wrong = self._attention(
            kind, self.threads, qkv.data_ptr(), width, out.data_ptr(), rows, num_heads, num_kv_heads, head_dim,
            k_cache.data_ptr(), v_cache.data_ptr(), k_scales, v_scales, blocks, block_size, query_start.data_ptr(),
            seq_lens.data_ptr(), block_table.data_ptr(), sequences, max_blocks, scale, window or 0,
        )  # fmt: skip
        if wrong:
            raise IndexError("attention: query_start, seq_lens or block_table point outside the rows or the cache")
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._run_activation(gate_up, _SILU_MUL, gate_up.shape[1] // 2)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        return self._run_activation(gate_up, _GELU_TANH_MUL, gate_up.shape[1] // 2)

    def gelu_new(self, x: Tensor) -> Tensor:
        return self._run_activation(x, _GELU_TANH, x.shape[1])

    def _run_activation(self, x: Tensor, kind: int, width: int) -> Tensor:
        dtype = _type_of(x)
        out = x.new_empty((x.shape[0], width))
        self._activation(dtype, self.threads, kind, x.data_ptr(), out.data_ptr(), x.shape[0], width)
        return out

    def pack_linear(
        self, weight: Tensor | Quantised, bias: Tensor | None = None, form: str | None = None
    ) -> PackedLinear | None:
        return self.products.pack(weight, bias, form)

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        return self.products.linear(x, packed, bias)

    def embed(self, ids: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
        return self.products.embed(ids, packed, dtype)


def _type_of(first: Tensor, *others: Tensor | None) -> int:
    """The common type's number in the library; refuses what raw pointers must not see."""
    dtype = first.dtype
    number = _TYPES.get(type_name(dtype))
    if number is None:
        raise ValueError(f"native kernels take float32 or bfloat16, not {dtype}")
    if not first.is_contiguous():
        raise ValueError("native kernels take contiguous tensors")
    for other in others:
        if other is None:
            continue
        if other.dtype is not dtype:
            raise ValueError(f"native kernels take one type, not {dtype} and {other.dtype}")
        if not other.is_contiguous():
            raise ValueError("native kernels take contiguous tensors")
    return number


def _check_indices(*indices: Tensor) -> None:
    for index in indices:
        if type_name(index.dtype) != "int32" or not index.is_contiguous():
            raise ValueError("indices are not contiguous int32")


def _check_heads(
    width: int, num_heads: int, num_kv_heads: int, head_dim: int, k_cache: Tensor, v_cache: Tensor
) -> tuple[int, int]:
    """Number and size of the blocks."""
    blocks, heads, block_size, dim = shape = k_cache.shape
    if num_heads % num_kv_heads or head_dim > MAX_HEAD_DIM:
        raise ValueError(f"query heads are not a multiple of key-value heads, or their size is above {MAX_HEAD_DIM}")
    if width != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError("qkv is not [T, (Hq + 2 Hk) D]")
    if heads != num_kv_heads or dim != head_dim or v_cache.shape != shape:
        raise ValueError("the caches are not [num_blocks, Hk, block_size, D]")
    return blocks, block_size


def _check_cache(
    dtype: torch.dtype, k_cache: Tensor, v_cache: Tensor, scales: tuple[Tensor, Tensor] | None
) -> tuple[int | None, int | None]:
    """Where the scales of an int8 cache lie; None for a cache of the arithmetic type."""
    held = "int8" if scales is not None else type_name(dtype)
    for part in (k_cache, v_cache):
        if type_name(part.dtype) != held or not part.is_contiguous():
            raise ValueError(f"native kernels take one type: the cache is {part.dtype}, not contiguous {held}")
    if scales is None:
        return None, None
    for scale in scales:
        if type_name(scale.dtype) != "float32" or scale.shape != k_cache.shape[:3] or not scale.is_contiguous():
            raise ValueError("the scales are not contiguous float32 [num_blocks, Hk, block_size]")
    return scales[0].data_ptr(), scales[1].data_ptr()
