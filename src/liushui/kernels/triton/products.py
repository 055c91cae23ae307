"""y = x @ weight.T in one order of sums for every number of rows.

Measured on Hopper: with one fp32 accumulator the order of the sum over K decides the bits, tile shapes do not, and
cuBLAS keeps the plain order except where it splits K itself. So the vendor's product serves where a certificate, taken
on this machine on sums that cancel, shows equal bits (`vendor`), and the kernel below where not. A certificate is taken
at the first use of a weight shape with a row count, and only for the row counts of `BUCKETS`; others go to the own
kernel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from liushui.kernels.triton.common import Kernel, begin, options, row_scale
from liushui.kernels.triton.rows import silu

BUCKETS = (
    *(1, 2, 4, 8, 16, 32, 64, 128, 192), *range(256, 1024, 64), *range(1024, 2048, 128), *range(2048, 16385, 256),
)  # fmt: skip
"""Row counts the vendor's product may serve; the runner pads a step to one of them. Up to 256 rows a product takes
about the time that its weights need, and those between these were measured to take no less (H100)."""


@triton.jit
def _finish(acc, up, bias, residual, out, place, mask, BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr):
    """What follows the sum, rounded where the separate kernels round. `bias` is broadcast to the tile."""
    if BIAS:
        acc += bias
    if GATED:
        acc = silu(acc.to(out.dtype.element_ty).to(tl.float32)) * up.to(out.dtype.element_ty).to(tl.float32)
    if ADD:
        old = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        acc = acc.to(out.dtype.element_ty).to(tl.float32) + old
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["M"])
def _product(
    x, weight, bias, norm, residual, out, M, N, K, eps,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, NARROW: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BN weight rows against BT tokens; weights on the matrix unit's long side.

    NARROW: tokens on the long side: as few as eight weight rows a program, so more programs.
    NORM: x, one row of at most NORM columns, is RMS-normed first. GATED: silu(x Wg) * (x Wu), with Wg the first N
    rows of the weight and Wu the next. ADD: the result is added to `residual` in place.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    # The weights' tile is [BN, BK], the tokens' [BK, BT], or the other way round.
    rows = rows[None, :] if NARROW else rows[:, None]
    tokens = tokens[:, None] if NARROW else tokens[None, :]
    of_weight = tl.expand_dims(tl.arange(0, BK), 1 if NARROW else 0)
    of_tokens = tl.expand_dims(tl.arange(0, BK), 0 if NARROW else 1)
    live, real = rows < N, tokens < M
    begin(PDL)
    acc = tl.zeros((BT, BN) if NARROW else (BN, BT), tl.float32)
    up = tl.zeros((BT, BN) if NARROW else (BN, BT), tl.float32)
    if NORM > 0:
        cols = tl.arange(0, NORM)
        scale = row_scale(tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32), K, eps, 0)
    w_at = weight + rows.to(tl.int64) * K
    x_at = x + tokens.to(tl.int64) * K
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_at + (k + of_weight), mask=live, other=0.0)
            t = tl.load(x_at + (k + of_tokens), mask=real, other=0.0)
        else:
            w = tl.load(w_at + (k + of_weight), mask=live & (k + of_weight < K), other=0.0)
            t = tl.load(x_at + (k + of_tokens), mask=real & (k + of_tokens < K), other=0.0)
        if NORM > 0:
            factor = tl.load(norm + k + of_tokens, mask=k + of_tokens < K, other=0.0).to(tl.float32)
            t = (t.to(tl.float32) * scale * factor).to(weight.dtype.element_ty)
        acc = tl.dot(t if NARROW else w, w if NARROW else t, acc, input_precision="ieee")
        if GATED:
            w = tl.load(w_at + N * K + (k + of_weight), mask=live & (k + of_weight < K), other=0.0)
            up = tl.dot(t if NARROW else w, w if NARROW else t, up, input_precision="ieee")
    added = tl.load(bias + rows, mask=live, other=0.0).to(tl.float32) if BIAS else 0.0
    _finish(acc, up, added, residual, out, tokens.to(tl.int64) * N + rows, live & real, BIAS, ADD, GATED)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["M"])
def _tiled(
    out, x, weight, bias, M, N, K,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_product` with tiles fetched by the bulk copy engine; neighbours share the weight rows."""
    tiles = tl.cdiv(M, BT)
    rows = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    tokens = tl.program_id(0) % tiles * BT + tl.arange(0, BT)
    begin(PDL)
    acc = tl.zeros((BN, BT), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        a = weight.load([tl.program_id(0) // tiles * BN, k])
        b = x.load([tl.program_id(0) % tiles * BT, k]).T
        acc = tl.dot(a, b, acc, input_precision="ieee")
    live, real = rows < N, tokens < M
    place = tokens[None, :].to(tl.int64) * N + rows[:, None]
    added = tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[:, None] if BIAS else 0.0
    _finish(acc, acc, added, out, out, place, live[:, None] & real[None, :], BIAS, False, False)


def _by_bulk_copies(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, k = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(rows, outputs)
    depth, stages = (128, 4) if rows <= 128 else (64, 6)  # measured on an H100
    _tiled[(triton.cdiv(outputs, 64) * triton.cdiv(rows, 64),)](
        out, TensorDescriptor(x, [rows, k], [k, 1], [64, depth]),
        TensorDescriptor(weight, [outputs, k], [k, 1], [64, depth]), bias if bias is not None else out,
        rows, outputs, k, BN=64, BT=64, BK=depth, BIAS=bias is not None, STAGES=stages, **options(True, 4, stages),
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of one launch; they do not touch the bits."""

    weights: int
    tokens: int
    k: int
    warps: int
    stages: int
    narrow: bool = False
    """Tokens on the long side."""


REFERENCE = Tiles(64, 16, 64, 4, 4)


def tiles_for(rows: int, outputs: int, k: int, wide: bool) -> Tiles:
    """Measured on an H100. `wide`: float32, whose tiles take twice the room."""
    if wide:
        return Tiles(32, 16, 32, 4, 2)
    if rows <= 16:
        if outputs * k < 2**24:  # too few weights for wide tiles to fill the chip
            return Tiles(8, 16, 256, 1, 4, True) if outputs < 2048 else Tiles(16, 16, 256, 2, 4, True)
        return Tiles(16, 16, 256, 2, 4, True) if k > 8192 else Tiles(64, 16, 128, 4, 4)
    if rows <= 64:
        return Tiles(64, 64, 128, 4, 3) if rows > 32 and outputs >= 20_000 else Tiles(64, 32, 128, 4, 4)
    # Few weight rows: smaller tiles of tokens, so that there are programs for all multiprocessors.
    return Tiles(64, 64, 128, 4, 3) if outputs < 8192 else Tiles(64, 128, 64, 4, 4)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chained: bool, tiles: Tiles | None = None, *,
    norm: torch.Tensor | None = None, eps: float = 0.0, residual: torch.Tensor | None = None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The own kernel: x [M, K], weight [N, K] (or [2 N, K] where `gated`) -> [M, N]; with `residual`, into it."""
    rows, k = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual if residual is not None else x.new_empty(rows, outputs)
    t = tiles or tiles_for(rows, outputs, k, x.dtype == torch.float32)
    plain = tiles is None and norm is None and residual is None and not gated
    if plain and chained and rows > 64 and k % 8 == 0 and x.element_size() == 2:
        return _by_bulk_copies(x, weight, bias)
    if norm is not None and rows != 1:
        raise ValueError(f"the norm is fused for one row, got {rows}")
    if rows:
        _product[(triton.cdiv(outputs, t.weights), triton.cdiv(rows, t.tokens))](
            x, weight, bias if bias is not None else x, norm if norm is not None else x, out, out,
            rows, outputs, k, eps,
            BN=t.weights, BT=t.tokens, BK=t.k, EVEN=k % t.k == 0, STAGES=t.stages, BIAS=bias is not None,
            NORM=triton.next_power_of_2(k) if norm is not None else 0, ADD=residual is not None, GATED=gated,
            NARROW=t.narrow, **options(chained, t.warps, t.stages),
        )  # fmt: skip
    return out


def own_is_faster(rows: int, outputs: int, k: int) -> bool:
    """Where the own kernel is the first choice (measured on an H100); it is always a right one."""
    return rows <= 32 or (rows <= 64 and (outputs >= 20_000 or outputs * k < 2**24))


def reference_tiles(weight: torch.Tensor) -> Tiles | None:
    """Of the launch whose bits are the measure."""
    return None if weight.dtype == torch.float32 else REFERENCE
