"""Packed GGUF rows -> float tensors, bit for bit as `gguf.quants` (the reference of llama.cpp) computes them.

The common types are decoded here, in pieces that stay in the processor's cache: 2 ns an element, so SmolLM2's 135
million take 0.3 s on one core. numpy and not torch, because torch would start a team of threads for each of these
short operations and wait for it, which is ruinous where other programs use the cores. numpy lets go of the
interpreter's lock, so several tensors can be loaded in parallel. The other types go through `gguf.quants`, which
is imported only then (0.2 s).

Formulas: ggml/src/ggml-quants.c, `dequantize_row_*`. In every function `blocks` is [n, bytes of a block], uint8,
and `out` [n, elements of a block], float32. Multiplication and addition stay separate operations, so that no
fused multiply-add changes a bit.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from liushui.errors import ModelError
from liushui.loading.gguf_types import TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_PIECE = 127 * 256
"""Elements decoded at a time: 127 KiB of float32, inside a core's own cache; whole blocks of every type; and just
below the 32,768 from which on torch would use its threads to round them."""


def dequantise(packed: Bytes, kind: TensorType, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Float tensor [rows, columns] of `dtype` from `packed`: uint8 [rows, bytes of a row], contiguous.

    Raises `ModelError`, naming the tensor `name`, for a type that cannot be decoded.
    """
    rows = packed.shape[0]
    if kind.name in _PLAIN:
        values = torch.from_numpy(packed.reshape(-1)).view(_PLAIN[kind.name])
        return values.to(dtype, copy=True).reshape(rows, -1)
    decode = _DECODERS.get(kind.name)
    if decode is None:
        return _by_reference(packed, kind, name).to(dtype)
    blocks = packed.reshape(-1, kind.nbytes)
    result = torch.empty(blocks.shape[0], kind.block, dtype=dtype)
    step = _PIECE // kind.block
    scratch = None if dtype is torch.float32 else torch.empty(min(step, blocks.shape[0]), kind.block)
    with np.errstate(all="ignore"):  # the scales of a damaged file may be infinite: no reason to warn
        for start in range(0, blocks.shape[0], step):
            part, target = blocks[start : start + step], result[start : start + step]
            if scratch is None:
                decode(part, target.numpy())
            else:
                values = scratch[: part.shape[0]]
                decode(part, values.numpy())
                target.copy_(values)
    return result.reshape(rows, -1)


def _by_reference(packed: Bytes, kind: TensorType, name: str) -> torch.Tensor:
    import gguf.quants  # slow to import, seldom needed

    try:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind.id))
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"tensor {name!r} has the type {kind.name}, which cannot be decoded: use another quantisation "
            "of the model, for example Q4_K_M or Q8_0"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@cache
def _halves() -> Floats:
    """All 65,536 float16 as float32: a look-up is much faster than numpy's conversion."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block: [n, 1]."""
    bits = blocks[:, at : at + 2].copy().view("<u2")
    return np.take(_halves(), bits)


def _nibbles(packed: Bytes, out: Floats) -> None:
    """`packed` is [..., m], `out` [..., 2 m]: the low halves of the bytes, then the high halves."""
    m = packed.shape[-1]
    values = packed.copy()
    np.copyto(out[..., :m], values & np.uint8(15))
    values >>= np.uint8(4)
    np.copyto(out[..., m:], values)


def _shifted(packed: Bytes, shifts: tuple[int, ...], mask: int) -> Bytes:
    """[n, g, m] -> [n, g, len(shifts), m]: the fields of `mask` at each of the `shifts` of every byte."""
    fields = packed[..., None, :] >> np.array(shifts, dtype=np.uint8)[:, None]
    fields &= np.uint8(mask)
    return fields


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 bits at byte `at` of each block, as 0 or 16: [n, 32]."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    bits <<= np.uint8(4)
    return bits


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 6:], out)
    out += _fifth_bits(blocks, 2)
    out -= np.float32(16)
    out *= _half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 8:], out)
    out += _fifth_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.copyto(out, blocks[:, 2:].view(np.int8))
    out *= _half(blocks, 0)


def _scale_k(blocks: Bytes, out: Floats) -> None:
    """Applies the eight 6-bit scales and minima at bytes 4 to 15 of a K block; d and dmin lead the block."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), axis=1)
    mins = np.concatenate((mid & 63, (high >> 4) | ((mid >> 2) & 48)), axis=1)
    groups = out.reshape(-1, 8, 32)
    groups *= (_half(blocks, 0) * scales)[:, :, None]
    groups -= (_half(blocks, 2) * mins)[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    _scale_k(blocks, out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 48:].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    fifth = _shifted(blocks[:, None, 16:48], tuple(range(8)), 1)
    fifth <<= np.uint8(4)
    out += fifth.reshape(-1, 256)
    _scale_k(blocks, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), out.reshape(-1, 2, 128))
    high = _shifted(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    high <<= np.uint8(4)
    out += high.reshape(-1, 256)
    out -= np.float32(32)
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_DECODERS: dict[str, Callable[[Bytes, Floats], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
