"""Row-wise kernels: norms, activations."""

import torch
import triton
import triton.language as tl

from liushui.kernels.triton.common import Kernel, begin, options, row_scale, warps_for


@Kernel
@triton.jit
def _rms_norm(
    x, weight, residual, out, size, eps,
    HAS_RESIDUAL: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    factor = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    begin(PDL)
    value = tl.load(x + row * size + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * size + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * size + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = row_scale(value, size, eps, 0)
    tl.store(out + row * size + cols, (value * scale * factor).to(out.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def _layer_norm(
    x, weight, bias, residual, out, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    begin(PDL)
    value = tl.load(x + row * size + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * size + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * size + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / size, 0.0)
    scale = row_scale(centred, size, eps, 0)
    factor = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + cols, (centred * scale * factor + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_tanh(x):
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@Kernel
@triton.jit
def _activate(x, out, size, GATED: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    begin(PDL)
    start = x + row * size * (2 if GATED else 1)
    gate = tl.load(start + cols, mask=inside, other=0.0).to(tl.float32)
    value = silu(gate) if SILU else _gelu_tanh(gate)
    if GATED:
        value *= tl.load(start + size + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + cols, value.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, unit_offset: bool, chained: bool
) -> torch.Tensor:
    out = x.new_empty(x.shape)
    rows, size = x.shape
    if rows:
        block = triton.next_power_of_2(size)
        _rms_norm[(rows,)](
            x, weight, residual if residual is not None else x, out, size, eps,
            HAS_RESIDUAL=residual is not None, UNIT_OFFSET=unit_offset, BLOCK=block,
            **options(chained, warps_for(block)),
        )  # fmt: skip
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None, chained: bool
) -> torch.Tensor:
    out = x.new_empty(x.shape)
    rows, size = x.shape
    if rows:
        block = triton.next_power_of_2(size)
        _layer_norm[(rows,)](
            x, weight, bias, residual if residual is not None else x, out, size, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, **options(chained, warps_for(block)),
        )  # fmt: skip
    return out


def activate(x: torch.Tensor, gated: bool, kind: str, chained: bool) -> torch.Tensor:
    """x [T, I], or [T, 2 I] where `gated` -> [T, I]."""
    rows, width = x.shape
    size = width // 2 if gated else width
    out = x.new_empty(rows, size)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        _activate[(rows, triton.cdiv(size, block))](
            x, out, size, GATED=gated, SILU=kind == "silu", BLOCK=block, **options(chained, warps_for(block))
        )
    return out
