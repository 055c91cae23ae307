"""Attention with matrix tiles, with software in place of the AMX instructions: values, and the same bits always."""

from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels import native
from liushui.kernels.native import NativeOps
from liushui.kernels.ops import load_ops
from tests.kernels import emulated
from tests.kernels.paged import Heads, Sequence, Share, attend

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "two_threads")
_OPS: dict[int, NativeOps] = {}


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Fills `_OPS` with the emulated kernels on one and on two threads."""
    library = native.open_library(emulated.library(("kernels", "linear"), ("amx",)))
    with mock.patch.object(native, "_library", return_value=library):
        for threads in (1, 2):
            ops = load_ops("native", threads, isa="amx")
            assert isinstance(ops, NativeOps)
            _OPS[threads] = ops
    yield
    _OPS.clear()


@pytest.mark.parametrize(
    ("heads", "length", "window"),
    [
        (Heads(9, 3, 64), 150, None),
        (Heads(4, 4, 20), 70, None),
        (Heads(2, 1, 80), 65, 17),
        (Heads(5, 1, 128), 63, 64),
        (Heads(1, 1, 1), 130, 1),
        (Heads(3, 3, 7), 1, None),
        (Heads(20, 1, 16), 40, None),
        (Heads(2, 1, 16), 700, 600),
    ],
)
def test_matches_float64(heads: Heads, length: int, window: int | None) -> None:
    sequence = Sequence.random(heads, length, torch.bfloat16, seed=length)
    scale = heads.dim**-0.5
    (got,) = attend(_OPS[2], [Share(sequence, 0, length)], scale, window, padding=3)
    torch.testing.assert_close(got.double(), sequence.expected(scale, window), rtol=0, atol=1.6e-2)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 150), max_size=3),
    heads=st.sampled_from([Heads(3, 1, 16), Heads(2, 2, 20), Heads(9, 3, 64), Heads(7, 1, 33)]),
    window=st.sampled_from([None, 1, 50, 64]),
    block_size=st.sampled_from([1, 2, 16, 128]),
    seed=st.integers(0, 1000),
)
def test_bits_ignore_the_batch(lengths, cuts, heads, window, block_size, seed) -> None:
    """Each sequence whole and alone, against its chunks (single rows among them) beside others."""
    sequences = [Sequence.random(heads, n, torch.bfloat16, seed + i) for i, n in enumerate(lengths)]
    whole = [attend(_OPS[1], [Share(s, 0, len(s.qkv))], 0.3, window)[0] for s in sequences]
    ends = sorted({0, 1, 2, *cuts, *lengths, *(n - 1 for n in lengths)})
    for start, end in pairwise(ends):
        members = [(i, min(start, n), min(end, n)) for i, n in enumerate(lengths) if start < n]
        shares = [Share(sequences[i], a, b) for i, a, b in members]
        if not shares:
            continue
        got = attend(_OPS[2], shares, 0.3, window, block_size, layout_seed=seed)
        for (i, a, b), rows in zip(members, got, strict=True):
            assert torch.equal(rows, whole[i][a:b])


def test_a_spoiled_neighbour_spoils_nobody_else() -> None:
    heads = Heads(3, 1, 48)
    good, bad = (Sequence.random(heads, 100, torch.bfloat16, seed) for seed in (1, 2))
    bad.qkv[70:] = torch.nan
    bad.qkv[80, -3] = torch.inf
    alone = attend(_OPS[2], [Share(good, 0, 100)])[0], attend(_OPS[2], [Share(bad, 0, 70)])[0]
    got = attend(_OPS[2], [Share(bad, 0, 100), Share(good, 0, 100)])
    assert torch.equal(got[1], alone[0])
    assert torch.equal(got[0][:70], alone[1])
    assert torch.isnan(got[0][70:]).all()


def test_long_sequences_in_splits() -> None:
    """Beyond one split of keys a lone decode is spread over threads and merged; a batch is not."""
    heads = Heads(6, 2, 24)
    sequences = [Sequence.random(heads, 1300, torch.bfloat16, seed) for seed in range(8)]
    batched = attend(_OPS[2], [Share(s, 1299, 1300) for s in sequences])
    (alone,) = attend(_OPS[2], [Share(sequences[5], 1299, 1300)])
    (chunk,) = attend(_OPS[2], [Share(sequences[5], 1240, 1300)])
    assert torch.equal(alone, batched[5])
    assert torch.equal(chunk[-1:], alone)
