"""Attention: the right values, and the same bits however the work is laid out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels.ops import Ops, load_ops
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.kernels.paged import Heads, Sequence, Share, attend

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(
    ("heads", "length", "window"),
    [
        (Heads(9, 3, 64), 150, None),
        (Heads(4, 4, 20), 70, None),
        (Heads(2, 1, 80), 65, 17),
        (Heads(4, 2, 96), 64, None),
        (Heads(5, 1, 128), 63, 64),
        (Heads(1, 1, 1), 130, 1),
        (Heads(3, 3, 7), 1, None),
        (Heads(100, 1, 16), 40, None),
        (Heads(2, 1, 16), 700, None),
        (Heads(1, 1, 16), 700, 600),
    ],
)
def test_matches_float64(ops: Ops, dtype: torch.dtype, heads: Heads, length: int, window: int | None) -> None:
    sequence = Sequence.random(heads, length, dtype, seed=length)
    scale = heads.dim**-0.5
    (got,) = attend(ops, [Share(sequence, 0, length)], scale, window, padding=3)
    torch.testing.assert_close(got.double(), sequence.expected(scale, window), rtol=0, atol=TOLERANCE[dtype])


def test_large_scores_and_one_key(ops: Ops) -> None:
    """Scores in the thousands: the largest takes all. A first token's output is its own value."""
    heads = Heads(2, 1, 16)
    sequence = Sequence.random(heads, 200, torch.float32, seed=3)
    (got,) = attend(ops, [Share(sequence, 0, 200)], scale=300.0)
    close = (got.double() - sequence.expected(300.0, None)).abs().amax(1)
    assert close.median() < 1e-3
    value = sequence.split()[2][0].repeat(2, 1).flatten()
    torch.testing.assert_close(got[0], value, rtol=1e-6, atol=1e-6)


@st.composite
def batches(draw: st.DrawFn):
    """Sequences cut into chunks anywhere, and the steps that feed them: any chunk beside any other."""
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    steps = []
    for index, length in enumerate(lengths):
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=3)) | {0, length})
        for start, end in pairwise(cuts):
            steps.append((draw(st.integers(0, 3)), index, start, end))
    return lengths, steps


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
@settings(max_examples=25, deadline=None)
@given(
    batch=batches(),
    heads=st.sampled_from([Heads(3, 1, 16), Heads(2, 2, 20), Heads(9, 3, 8), Heads(7, 1, 33)]),
    window=st.sampled_from([None, None, 1, 50, 64, 90]),
    block_size=st.sampled_from([1, 2, 16, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
    padding=st.integers(0, 2),
)
def test_bits_ignore_the_batch(name, batch, heads, window, block_size, dtype, seed, padding) -> None:
    """Each sequence whole, alone and on one thread, against its chunks among others, in other blocks."""
    lengths, steps = batch
    ops = IMPLEMENTATIONS[name]
    alone = load_ops("torch", 1) if name == "torch" else load_ops("native", 1, isa=name)
    sequences = [Sequence.random(heads, n, dtype, seed + i) for i, n in enumerate(lengths)]
    whole = [attend(alone, [Share(s, 0, len(s.qkv))], 0.3, window)[0] for s in sequences]
    for step in range(4):
        members = [(index, start, end) for when, index, start, end in steps if when == step]
        if not members:
            continue
        shares = [Share(sequences[index], start, end) for index, start, end in members]
        got = attend(ops, shares, 0.3, window, block_size, layout_seed=seed, padding=padding)
        for (index, start, end), rows in zip(members, got, strict=True):
            assert torch.equal(rows, whole[index][start:end])


def test_splitting_a_long_sequence_over_threads_changes_nothing(ops: Ops, dtype: torch.dtype) -> None:
    """Beyond one split of keys, a lone decode is spread over threads and merged; a large batch is not."""
    heads = Heads(6, 2, 24)
    sequences = [Sequence.random(heads, 1300, dtype, seed) for seed in range(8)]
    for window in (None, 700):
        batched = attend(ops, [Share(s, 1299, 1300) for s in sequences], window=window)
        (alone,) = attend(ops, [Share(sequences[5], 1299, 1300)], window=window)
        (chunk,) = attend(ops, [Share(sequences[5], 1240, 1300)], window=window)
        assert torch.equal(alone, batched[5])
        assert torch.equal(chunk[-1:], alone)


def test_empty_share_and_no_rows(ops: Ops) -> None:
    sequence = Sequence.random(Heads(2, 1, 16), 40, torch.float32, seed=1)
    empty, row = attend(ops, [Share(sequence, 30, 30), Share(sequence, 39, 40)])
    assert empty.shape == (0, 32)
    assert torch.equal(row, attend(ops, [Share(sequence, 39, 40)])[0])
    none = attend(ops, [Share(sequence, 5, 5)], padding=2)
    assert none[0].shape == (0, 32)


def test_a_spoiled_neighbour_spoils_nobody_else(ops: Ops, dtype: torch.dtype) -> None:
    """Non-finite values of one sequence, or of a later token of the same one, stay where they belong."""
    heads = Heads(3, 1, 16)
    good, bad = (Sequence.random(heads, 100, dtype, seed) for seed in (1, 2))
    bad.qkv[70:] = torch.nan
    bad.qkv[80, -3] = torch.inf
    alone = attend(ops, [Share(good, 0, 100)])[0], attend(ops, [Share(bad, 0, 70)])[0]
    got = attend(ops, [Share(bad, 0, 100), Share(good, 0, 100)])
    assert torch.equal(got[1], alone[0])
    assert torch.equal(got[0][:70], alone[1])
    assert torch.isnan(got[0][70:]).all()


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "torch"])
@pytest.mark.parametrize("wrong", ["block", "length", "rows"])
def test_indices_out_of_range_are_refused(name: str, wrong: str) -> None:
    ops = IMPLEMENTATIONS[name]
    cache = torch.zeros(2, 1, 16, 8)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    if wrong == "block":
        table[0, 1] = 2
    elif wrong == "length":
        lens[0] = 33
    else:
        starts[1] = 2
    with pytest.raises(IndexError, match="attention"):
        ops.attention(torch.zeros(1, 24), 1, 1, 8, cache, cache, starts, lens, table, 1.0)
