"""q and k normed and rotated, k and v written to the paged cache: one kernel."""

import torch
import triton
import triton.language as tl

from liushui.kernels.triton.common import Kernel, begin, options, row_scale, warps_for


@triton.jit
def rotated(x, partner, cols, rope_row, HALF: tl.constexpr):
    """NeoX rotation of [heads, D] values; `partner` holds the other member of each pair."""
    turns = cols < 2 * HALF
    angle = tl.where(cols < HALF, cols, cols - HALF)
    cos = tl.load(rope_row + angle, mask=turns, other=1.0)
    sin = tl.load(rope_row + HALF + angle, mask=turns, other=0.0)
    sign = tl.where(cols < HALF, -1.0, 1.0)
    return tl.fma(x, tl.expand_dims(cos, 0), partner * tl.expand_dims(sin * sign, 0))


@Kernel
@triton.jit
def _qkv_to_cache(
    qkv, positions, slots, k_cache, v_cache, rope, q_norm, k_norm, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HB: tl.constexpr, BS: tl.constexpr,
    HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HB + tl.arange(0, HB)
    cols = tl.arange(0, DP)
    is_q, is_v = heads < HQ, heads >= HQ + HK
    mask = (heads < HQ + 2 * HK)[:, None] & (cols < D)[None, :]
    begin(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        start = qkv + row * ((HQ + 2 * HK) * D) + heads[:, None] * D
        raw = tl.load(start + cols[None, :], mask=mask, other=0.0)
        x = raw.to(tl.float32)
        other = cols
        partner = x
        if HALF > 0:
            other = tl.where(cols < HALF, cols + HALF, tl.where(cols < 2 * HALF, cols - HALF, cols))
            partner = tl.load(start + other[None, :], mask=mask, other=0.0).to(tl.float32)
        if Q_NORM or K_NORM:
            scale = row_scale(x, D, eps, 1)[:, None]
            normed_x, normed_partner = x * scale, partner * scale
            if Q_NORM:
                weight = tl.load(q_norm + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                weight_of_partner = tl.load(q_norm + other, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                x = tl.where(is_q[:, None], normed_x * weight, x)
                partner = tl.where(is_q[:, None], normed_partner * weight_of_partner, partner)
            if K_NORM:
                is_k = ((heads >= HQ) & (heads < HQ + HK))[:, None]
                weight = tl.load(k_norm + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                weight_of_partner = tl.load(k_norm + other, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                x = tl.where(is_k, normed_x * weight, x)
                partner = tl.where(is_k, normed_partner * weight_of_partner, partner)
        if HALF > 0:
            rope_row = rope + tl.load(positions + row).to(tl.int64) * (2 * HALF)
            x = rotated(x, partner, cols, rope_row, HALF)
        y = x.to(qkv.dtype.element_ty)
        tl.debug_barrier()  # a thread's partner may be another thread's element: all read before any writes
        tl.store(start + cols[None, :], y, mask=mask & is_q[:, None])
        at_k = (((slot // BS) * HK + heads - HQ) * BS + slot % BS) * D
        at_v = at_k - HK * BS * D
        is_k = (heads >= HQ) & (heads < HQ + HK)
        tl.store(k_cache + at_k[:, None] + cols[None, :], y, mask=mask & is_k[:, None])
        tl.store(v_cache + at_v[:, None] + cols[None, :], raw, mask=mask & is_v[:, None])


def qkv_to_cache(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int, positions: torch.Tensor, slots: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, rope: torch.Tensor | None, q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None, eps: float, chained: bool,
) -> None:  # fmt: skip
    rows = qkv.shape[0]
    if not rows:
        return
    padded = triton.next_power_of_2(head_dim)
    heads = num_heads + 2 * num_kv_heads
    block = min(triton.next_power_of_2(heads), max(1, 1024 // padded))
    _qkv_to_cache[(rows, triton.cdiv(heads, block))](
        qkv, positions, slots, k_cache, v_cache, rope if rope is not None else qkv,
        q_norm if q_norm is not None else qkv, k_norm if k_norm is not None else qkv, eps,
        HQ=num_heads, HK=num_kv_heads, D=head_dim, DP=padded, HB=block, BS=k_cache.shape[2],
        HALF=rope.shape[1] // 2 if rope is not None else 0, Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
        **options(chained, warps_for(block * padded)),
    )  # fmt: skip
