"""`cache.qkv_to_cache` where whole heads turn: a program takes heads of one kind of a token, each value read once.

The two halves of a head are two tiles of the same layout, so that a thread holds both members of a pair it turns.
"""

import math

import torch
import triton
import triton.language as tl

from liushui.kernels.triton.common import Kernel, begin, magnitude, options, scaled_squares, unscaled


@triton.jit
def _pairs_scale(low, high, size, eps):
    """`common.row_scale` of rows in two halves [heads, D / 2] -> [heads, 1]."""
    top = tl.maximum(tl.max(magnitude(low), 1), tl.max(magnitude(high), 1))
    spread = tl.expand_dims(top, 1)
    total = tl.sum(scaled_squares(low, spread), 1) + tl.sum(scaled_squares(high, spread), 1)
    return tl.expand_dims(tl.rsqrt(unscaled(total, top) / size + eps), 1)


@triton.jit
def _turned(low, high, norm, angles, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Heads normed where NORM, and rotated."""
    cols = tl.arange(0, HALF)
    if NORM:
        scale = _pairs_scale(low, high, 2 * HALF, eps)
        low = low * scale * tl.load(norm + cols).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm + HALF + cols).to(tl.float32)[None, :]
    cos, sin = tl.load(angles + cols)[None, :], tl.load(angles + HALF + cols)[None, :]
    return tl.fma(low, cos, high * (sin * -1.0)), tl.fma(high, cos, low * (sin * 1.0))


@Kernel
@triton.jit
def _rotate(
    qkv, positions, slots, k_cache, v_cache, rope, q_norm, k_norm, eps,
    HQ: tl.constexpr, HK: tl.constexpr, HB: tl.constexpr, BS: tl.constexpr, HALF: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HB heads of one row: all of queries, of keys or of values."""
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HB
    heads = tl.arange(0, HB)[:, None]
    cols = tl.arange(0, HALF)[None, :]
    begin(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        at = qkv + row * ((HQ + 2 * HK) * D) + (first + heads) * D + cols
        low, high = tl.load(at), tl.load(at + HALF)
        angles = rope + tl.load(positions + row).to(tl.int64) * D
        into = ((slot // BS) * HK * BS + slot % BS) * D + cols
        if first < HQ:
            x, y = _turned(low.to(tl.float32), high.to(tl.float32), q_norm, angles, eps, HALF, Q_NORM)
            tl.store(at, x.to(low.dtype))
            tl.store(at + HALF, y.to(low.dtype))
        elif first < HQ + HK:
            x, y = _turned(low.to(tl.float32), high.to(tl.float32), k_norm, angles, eps, HALF, K_NORM)
            place = k_cache + into + (first - HQ + heads) * (BS * D)
            tl.store(place, x.to(low.dtype))
            tl.store(place + HALF, y.to(low.dtype))
        else:
            place = v_cache + into + (first - HQ - HK + heads) * (BS * D)
            tl.store(place, low)
            tl.store(place + HALF, high)


def serves(num_heads: int, num_kv_heads: int, head_dim: int, rope: torch.Tensor | None) -> bool:
    """Whole heads are rotated, in halves of a power of two."""
    half = head_dim // 2
    return rope is not None and rope.shape[1] == head_dim == 2 * half and half >= 16 and half & (half - 1) == 0


def qkv_to_cache(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int, positions: torch.Tensor, slots: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, rope: torch.Tensor | None, q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None, eps: float, chained: bool,
) -> None:  # fmt: skip
    """`cache.qkv_to_cache`, where `serves`: the same bits."""
    block = math.gcd(math.gcd(num_heads, num_kv_heads), 8)
    _rotate[(qkv.shape[0], (num_heads + 2 * num_kv_heads) // block)](
        qkv, positions, slots, k_cache, v_cache, rope, q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv, eps,
        HQ=num_heads, HK=num_kv_heads, HB=block, BS=k_cache.shape[2], HALF=head_dim // 2, Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None, **options(chained, max(1, block * head_dim // 256)),
    )  # fmt: skip
