"""Sequences with known queries, keys and values, laid out in a paged cache in any way one likes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from liushui.kernels.ops import Ops


@dataclass(frozen=True)
class Heads:
    queries: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Sequence:
    """qkv [L, (Hq + 2 Hk) D]: what the model would feed at each position."""

    heads: Heads
    qkv: Tensor

    @classmethod
    def random(cls, heads: Heads, length: int, dtype: torch.dtype, seed: int) -> "Sequence":
        generator = torch.Generator().manual_seed(seed)
        width = (heads.queries + 2 * heads.kv) * heads.dim
        return cls(heads, torch.randn(length, width, generator=generator).to(dtype))

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [L, Hq, D], k and v [L, Hk, D]."""
        h = self.heads
        q, k, v = self.qkv.view(len(self.qkv), -1, h.dim).split([h.queries, h.kv, h.kv], dim=1)
        return q, k, v

    def expected(self, scale: float, window: int | None) -> Tensor:
        """Attention of every position in float64, [L, Hq D]."""
        q, k, v = (x.double().transpose(0, 1) for x in self.split())
        group = self.heads.queries // self.heads.kv
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        position = torch.arange(q.shape[1])
        visible = position <= position[:, None]
        if window is not None:
            visible &= position > position[:, None] - window
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Share:
    """Positions start .. end - 1 of a sequence are this step's; those before are in the cache already."""

    sequence: Sequence
    start: int
    end: int


def attend(
    ops: Ops,
    shares: list[Share],
    scale: float = 0.125,
    window: int | None = None,
    block_size: int = 16,
    layout_seed: int = 0,
    padding: int = 0,
) -> list[Tensor]:
    """The shares' rows through one call of `attention`; everything not written is NaN. Also checks the padding."""
    heads, dtype = shares[0].sequence.heads, shares[0].sequence.qkv.dtype
    counts = [-(-share.end // block_size) for share in shares]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(layout_seed)).tolist()
    shape = (num_blocks, heads.kv, block_size, heads.dim)
    caches = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    table = torch.zeros(len(shares), max([*counts, 1]), dtype=torch.int32)
    for row, (share, count) in enumerate(zip(shares, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        position = torch.arange(share.end)
        block = table[row, position // block_size].long()
        for cache, written in zip(caches, share.sequence.split()[1:], strict=True):
            cache[block, :, position % block_size] = written[: share.end]
    rows = [share.sequence.qkv[share.start : share.end] for share in shares]
    rows.append(torch.full((padding, rows[0].shape[1]), torch.nan, dtype=dtype))
    lengths = [share.end - share.start for share in shares]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    lens = torch.tensor([share.end for share in shares], dtype=torch.int32)
    out = ops.attention(
        torch.cat(rows), heads.queries, heads.kv, heads.dim, *caches, starts, lens, table, scale, window
    )
    assert torch.equal(out[int(starts[-1]) :], out.new_zeros(padding, out.shape[1]))
    return list(out[: int(starts[-1])].split(lengths))
