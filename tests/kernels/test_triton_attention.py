"""Paged attention in Triton: against float64, and the same bits whatever the company, the cut and the programs."""

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.triton import attention
from tests.kernels.paged import Heads, Sequence, Share, attend
from tests.kernels.triton_support import COMPILED, DEVICE, DTYPES, MARK, TOLERANCE, close, on_device, ops, same

pytestmark = MARK

SHORT = 1500 if COMPILED else 75


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMPILED:  # the interpreter is slow
        monkeypatch.setattr(attention, "SPLIT", 32)
        monkeypatch.setattr(attention, "BN", 16)


class OnDevice:
    """`Ops.attention` with every tensor moved to the device, `parallel` and the tile forced if asked."""

    def __init__(self, parallel: int | None = None, **tile: int) -> None:
        self.parallel, self.tile = parallel, tile

    def attention(self, qkv, hq, hk, d, k, v, starts, lens, table, scale, window):
        qkv, k, v, starts, lens, table = map(on_device, (qkv, k, v, starts, lens, table))
        shape = attention.Shape(hq, hk, d, k.shape[2])
        out = torch.full((len(qkv), hq * d), torch.nan, dtype=qkv.dtype, device=DEVICE)
        batch = (qkv, k, v, out, starts, lens, table, scale, window)
        arrived = torch.zeros(len(lens) * hk, dtype=torch.int32, device=DEVICE)
        attention.decode(shape, *batch, arrived, ops().chained, parallel=self.parallel)
        attention.chunks(shape, *batch, ops().chained, **self.tile)
        assert not arrived.any()
        return out


# Compiling float32's kernels, whose products are not the matrix unit's, takes ten seconds each: few of them here.
ODD, MANY, WIDE = Heads(6, 2, 20), Heads(4, 4, 16), Heads(8, 2, 64)
KINDS = [(dtype, heads) for dtype in DTYPES for heads in ((ODD, MANY, WIDE) if dtype == DTYPES[-1] else (ODD,))]
BITS = [(torch.bfloat16, Heads(6, 2, 32), None), (torch.bfloat16, Heads(4, 1, 64), 100), (torch.float32, ODD, 100)]


@pytest.mark.parametrize(("dtype", "heads"), KINDS)
def test_against_float64(dtype: torch.dtype, heads: Heads) -> None:
    lengths = (1, 70, SHORT, 33)
    sequences = [Sequence.random(heads, n, dtype, seed) for seed, n in enumerate(lengths)]
    shares = [Share(sequences[0], 0, 1), Share(sequences[1], 69, 70), Share(sequences[2], SHORT - 9, SHORT)]
    shares.append(Share(sequences[3], 0, 33))
    for share, got in zip(shares, attend(OnDevice(rows=32, num_warps=4), shares), strict=True):
        close(got, share.sequence.expected(0.125, None)[share.start : share.end], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 40, 300])
def test_window(window: int) -> None:
    sequence = Sequence.random(Heads(2, 1, 16), SHORT, torch.float32, 3)
    expected = sequence.expected(0.125, window)
    shares = [Share(sequence, SHORT - 1, SHORT), Share(sequence, SHORT - 20, SHORT), Share(sequence, 0, 30)]
    for parallel in (1, 4):
        for share, got in zip(shares, attend(OnDevice(parallel), shares, window=window), strict=True):
            close(got, expected[share.start : share.end], 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("dtype", "heads", "window"), BITS if COMPILED else [(torch.float16, *kind[1:]) for kind in BITS[:2]]
)
def test_same_bits_alone_in_company_in_chunks_and_shared(dtype: torch.dtype, heads: Heads, window: int | None) -> None:
    """Each position decoded alone = as a part of any chunk, in any tile, other blocks and block sizes, any programs."""
    sequence, other = Sequence.random(heads, SHORT, dtype, 1), Sequence.random(heads, 40, dtype, 2)
    probes = [0, 63, 64, SHORT - 30, SHORT - 1]
    alone = {p: attend(OnDevice(1), [Share(sequence, p, p + 1)], window=window)[0][0] for p in probes}
    forms = [OnDevice(16, rows=16, num_warps=4), OnDevice(4), OnDevice(1, rows=64, num_warps=4)]
    for form in forms[: None if COMPILED else 1]:
        cut = SHORT - 31
        shares = [Share(other, 39, 40), Share(sequence, SHORT - 1, SHORT), Share(sequence, cut, SHORT)]
        shares += [Share(other, 0, 21), Share(sequence, 62, 65), Share(sequence, 0, 1)]
        company = attend(form, shares, window=window, block_size=8, layout_seed=5)
        same(company[1][0], alone[SHORT - 1])
        same(company[2][-1], alone[SHORT - 1])
        same(company[2][1], alone[SHORT - 30])
        same(company[4][1], alone[63])
        same(company[4][2], alone[64])
        same(company[5][0], alone[0])


def test_padding_sequences_are_zero() -> None:
    """A padded sequence (length 0, one row) is written as zeros and reads nothing."""
    shape, cache = attention.Shape(2, 1, 16, 16), torch.full((1, 1, 16, 16), torch.nan, device=DEVICE)
    qkv = torch.full((3, 64), torch.nan, device=DEVICE)
    for parallel in (1, 4):
        out = torch.full((3, 32), torch.nan, device=DEVICE)
        batch = (torch.arange(4), torch.zeros(3), torch.zeros(3, 40))
        starts, lens, table = (part.to(DEVICE, torch.int32) for part in batch)
        arrived = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        attention.decode(shape, qkv, cache, cache, out, starts, lens, table, 1.0, None, arrived, ops().chained,
                         parallel=parallel)  # fmt: skip
        assert torch.equal(out.cpu(), torch.zeros(3, 32))


@pytest.mark.skipif(not COMPILED, reason="shared memory has no end in the interpreter")
@pytest.mark.parametrize(("dim", "dtype"), [(256, torch.bfloat16), (256, torch.float32)])
def test_wide_heads_find_room(dim: int, dtype: torch.dtype) -> None:
    sequence, scale = Sequence.random(Heads(4, 2, dim), 700, dtype, 9), dim**-0.5
    shares = [Share(sequence, 699, 700), Share(sequence, 500, 700), Share(sequence, 0, 70)]
    for share, got in zip(shares, attend(OnDevice(), shares, scale=scale, block_size=64), strict=True):
        close(got, sequence.expected(scale, None)[share.start : share.end], 2 * TOLERANCE[dtype])
