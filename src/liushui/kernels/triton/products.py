"""y = x @ weight.T in one order of sums for every number of rows.

Measured on Hopper: with one fp32 accumulator the order of the sum over K decides the bits, tile shapes do not, and
cuBLAS keeps the plain order except where it splits K itself. So the vendor's product serves where a certificate, taken
on this machine on random data, shows equal bits, and the kernel below where not. A certificate is taken at the first
use of a weight shape with a row count, and only for the row counts of `BUCKETS`; others go to the own kernel.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from liushui.kernels.triton.common import begin, magnitude, options, scaled_squares, unscaled
from liushui.kernels.triton.rows import silu

BUCKETS = (
    *(1, 2, 4, 8), *range(16, 128, 16), *range(128, 256, 32), *range(256, 1024, 64), *range(1024, 2048, 128),
    *range(2048, 16385, 256),
)  # fmt: skip
"""Row counts the vendor's product may serve; the runner pads a step to one of them."""


@triton.jit
def _row_scales(x, tokens, M, K, eps, BT: tl.constexpr, BK: tl.constexpr):
    """As `common.row_scale` of BT rows, walked twice: the same bits, since the sum is exact."""
    top = tl.zeros((BT,), tl.int32)
    total = tl.zeros((BT,), tl.int64)
    at = x + tokens[:, None].to(tl.int64) * K
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        part = tl.load(at + cols[None, :], mask=(tokens < M)[:, None] & (cols < K)[None, :], other=0.0)
        top = tl.maximum(top, tl.max(magnitude(part.to(tl.float32)), 1))
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        part = tl.load(at + cols[None, :], mask=(tokens < M)[:, None] & (cols < K)[None, :], other=0.0)
        total += tl.sum(scaled_squares(part.to(tl.float32), top[:, None]), 1)
    return tl.rsqrt(unscaled(total, top) / K + eps)


@triton.jit
def _product(
    x, weight, bias, norm, residual, out, M, N, K, eps,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN weight rows against BT tokens; weights on the matrix unit's long side.

    NORM: x is RMS-normed first. GATED: silu(x Wg) * (x Wu), with Wg the first N rows of the weight and Wu the next.
    ADD: the result is added to `residual` in place. Each rounds where the separate kernels round.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    ks = tl.arange(0, BK)
    live, real = rows < N, tokens < M
    begin(PDL)
    acc = tl.zeros((BN, BT), tl.float32)
    up = tl.zeros((BN, BT), tl.float32)
    if NORM:
        scale = _row_scales(x, tokens, M, K, eps, BT, BK)
    w_at = weight + rows[:, None].to(tl.int64) * K
    x_at = x + tokens[None, :].to(tl.int64) * K
    for k in tl.range(0, K, BK, num_stages=STAGES):
        at = k + ks
        inside = at < K
        if EVEN:
            a = tl.load(w_at + at[None, :], mask=live[:, None], other=0.0)
            b = tl.load(x_at + at[:, None], mask=real[None, :], other=0.0)
        else:
            a = tl.load(w_at + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            b = tl.load(x_at + at[:, None], mask=real[None, :] & inside[:, None], other=0.0)
        if NORM:
            factor = tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
            b = (b.to(tl.float32) * scale[None, :] * factor[:, None]).to(weight.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if GATED:
            c = tl.load(w_at + N * K + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            up = tl.dot(c, b, up, input_precision="ieee")
    place = tokens[None, :].to(tl.int64) * N + rows[:, None]
    mask = live[:, None] & real[None, :]
    if BIAS:
        acc += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc = silu(acc.to(out.dtype.element_ty).to(tl.float32)) * up.to(out.dtype.element_ty).to(tl.float32)
    if ADD:
        old = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        acc = acc.to(out.dtype.element_ty).to(tl.float32) + old
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of one launch; they do not touch the bits."""

    weights: int
    tokens: int
    k: int
    warps: int
    stages: int


REFERENCE = Tiles(64, 16, 64, 4, 4)


def tiles_for(rows: int, outputs: int, wide: bool) -> Tiles:
    """`wide`: float32, whose tiles take twice the room."""
    if wide:
        return Tiles(32, 16, 32, 4, 2)
    if rows <= 16:
        if outputs >= 64 * 132:
            return Tiles(64, 16, 128, 4, 4)
        return Tiles(32, 16, 128, 4, 4) if outputs >= 32 * 100 else Tiles(16, 16, 256, 4, 4)
    tokens = 32 if rows <= 32 else 64 if rows <= 64 else 128
    return Tiles(64, tokens, 64, 4, 4)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chained: bool, tiles: Tiles | None = None, *,
    norm: torch.Tensor | None = None, eps: float = 0.0, residual: torch.Tensor | None = None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The own kernel: x [M, K], weight [N, K] (or [2 N, K] where `gated`) -> [M, N]; with `residual`, into it."""
    rows, k = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual if residual is not None else x.new_empty(rows, outputs)
    t = tiles or tiles_for(rows, outputs, x.dtype == torch.float32)
    if rows:
        _product[(triton.cdiv(outputs, t.weights), triton.cdiv(rows, t.tokens))](
            x, weight, bias if bias is not None else x, norm if norm is not None else x, out, out,
            rows, outputs, k, eps,
            BN=t.weights, BT=t.tokens, BK=t.k, EVEN=k % t.k == 0,
            BIAS=bias is not None, NORM=norm is not None, ADD=residual is not None, GATED=gated, STAGES=t.stages,
            **options(chained, t.warps, t.stages),
        )  # fmt: skip
    return out


@dataclass(slots=True)
class Certificate:
    """Which row counts of one weight shape the vendor's product serves in the own kernel's order."""

    verdicts: dict[int, bool] = field(default_factory=dict)

    def allows(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        if rows not in self.verdicts:
            self.verdicts[rows] = rows in _BUCKETS and _keeps_order(rows, weight, bias)
        return self.verdicts[rows]

    def describe(self) -> str:
        """Row counts seen, as "vendor 1-8, 256; own 16-192"."""
        groups = {
            name: [rows for rows, verdict in sorted(self.verdicts.items()) if verdict is kept]
            for name, kept in (("vendor", True), ("own", False))
        }
        return "; ".join(f"{name} {', '.join(map(str, rows))}" for name, rows in groups.items() if rows)


_BUCKETS = frozenset(BUCKETS)
_SAMPLE_ROWS = 256


def _keeps_order(rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Compare random rows, bit for bit: all where there are few, the first and last where many."""
    generator = torch.Generator(weight.device).manual_seed(rows)
    x = torch.randn(rows, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    got = F.linear(x, weight, bias)
    for part in {0, max(0, rows - _SAMPLE_ROWS)}:
        piece = slice(part, part + _SAMPLE_ROWS)
        if not torch.equal(got[piece], product(x[piece], weight, bias, False, _reference(weight))):
            return False
    return True


def _reference(weight: torch.Tensor) -> Tiles | None:
    return None if weight.dtype == torch.float32 else REFERENCE
