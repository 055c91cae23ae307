"""Attention in bfloat16, of matrix tiles and of vectors, on machines without their instructions with software in their
place: values, and the same bits always."""

from collections.abc import Iterator
from contextlib import ExitStack
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
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.kernels.paged import Heads, Sequence, Share, attend

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "two_threads")
_OPS: dict[int, NativeOps] = {}


REAL = [name for name in ("avx512bf16", "amx") if name in IMPLEMENTATIONS]


@pytest.fixture(scope="module", params=["emulated avx512bf16", "emulated amx", *REAL])
def two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills `_OPS` with the kernels on one and on two threads."""
    *in_software, isa = request.param.split()
    with ExitStack() as stack:
        if in_software:
            library = native.open_library(emulated.library(("kernels", "linear", "step"), (isa,)))
            stack.enter_context(mock.patch.object(native, "_library", return_value=library))
        for threads in (1, 2):
            ops = load_ops("native", threads, isa=isa)
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
        (Heads(7, 1, 32), 300, None),
        (Heads(8, 1, 256), 270, 200),
        (Heads(16, 2, 40), 257, None),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_matches_float64(heads: Heads, length: int, window: int | None, sign: int) -> None:
    sequence = Sequence.random(heads, length, torch.bfloat16, seed=length)
    scale = sign * heads.dim**-0.5
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
    for window in (None, 700):
        batched = attend(_OPS[2], [Share(s, 1299, 1300) for s in sequences], window=window)
        (alone,) = attend(_OPS[2], [Share(sequences[5], 1299, 1300)], window=window)
        (chunk,) = attend(_OPS[2], [Share(sequences[5], 1240, 1300)], window=window)
        assert torch.equal(alone, batched[5])
        assert torch.equal(chunk[-1:], alone)


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 8, 9, 16, 20, 40])
@pytest.mark.parametrize("window", [None, 300])
def test_a_row_alone_is_the_row_in_a_prompt(queries: int, window: int | None) -> None:
    """However many rows share a vector: every position computed alone, against the prompt in one piece."""
    heads = Heads(queries, 1, 32)
    sequence = Sequence.random(heads, 600, torch.bfloat16, seed=queries)
    (whole,) = attend(_OPS[2], [Share(sequence, 0, 600)], window=window)
    for position in (0, 1, 31, 32, 127, 128, 129, 255, 256, 300, 384, 512, 599):
        (alone,) = attend(_OPS[1], [Share(sequence, position, position + 1)], window=window)
        assert torch.equal(alone[0], whole[position])


def test_zeros_keep_no_sign() -> None:
    """Values so small that sums vanish, on either side of zero: the same zero in company of later tokens."""
    heads = Heads(1, 1, 16)
    sequence = Sequence.random(heads, 40, torch.bfloat16, seed=4)
    sequence.qkv[:, 32:] *= 1.2e-38
    (whole,) = attend(_OPS[1], [Share(sequence, 0, 40)])
    for position in range(40):
        (alone,) = attend(_OPS[1], [Share(sequence, position, position + 1)])
        assert torch.equal(alone[0].view(torch.int16), whole[position].view(torch.int16))


def test_large_scores_and_one_key() -> None:
    """Scores in the thousands: the largest takes all. A first token's output is its own value, exactly."""
    heads = Heads(2, 1, 16)
    sequence = Sequence.random(heads, 300, torch.bfloat16, seed=3)
    (got,) = attend(_OPS[1], [Share(sequence, 0, 300)], scale=300.0)
    close = (got.double() - sequence.expected(300.0, None)).abs().amax(1)
    assert close.median() < 1e-3
    assert torch.equal(got[0], sequence.split()[2][0].repeat(2, 1).flatten())


@pytest.mark.parametrize("queries", [1, 6, 16])
def test_weights_are_near_the_powers_over_all_of_their_range(queries: int) -> None:
    """Each key's value is a direction of its own: outputs are the weights, at many fractions of a power of two."""
    heads, errors = Heads(queries, 1, 32), []
    for seed in range(8):
        sequence = Sequence.random(heads, 32, torch.bfloat16, seed)
        queries_, keys, values = (x[:] for x in sequence.split())
        queries_.zero_()[..., 0] = 1
        keys[..., 1:] = 0
        keys[:, 0, 0] *= 4
        values[:, 0] = torch.eye(32, dtype=torch.bfloat16)
        (got,) = attend(_OPS[1], [Share(sequence, 0, 32)], scale=1.0)
        expected = keys[:, 0, 0].double().softmax(0)
        assert torch.equal(got[-1].view(queries, 32), got[-1, :32].expand(queries, 32))
        errors.append(got[-1, :32].double() / expected - 1)
    error = torch.cat(errors)
    assert error.abs().max() < 0.015
    assert error.square().mean().sqrt() < 0.0035


def test_weights_of_scores_far_below_are_zero() -> None:
    """From where the smallest normal number ends, and at any distance: no wrapping around."""
    heads = Heads(1, 1, 32)
    for distance in (88.0, 100.0, 1e3, 3.4e4, 4e4, 7e4, 1e5, 1e9, 3e38):
        sequence = Sequence(heads, torch.zeros(2, 96, dtype=torch.bfloat16))
        queries, keys, values = sequence.split()
        queries[..., 0], keys[0, 0, 0], values[0], values[1] = 1, -distance, 5, 3
        (got,) = attend(_OPS[1], [Share(sequence, 0, 2)], scale=1.0)
        assert torch.equal(got[1], torch.full((32,), 3.0).bfloat16())


def test_values_that_only_some_rows_see_are_not_finite_in_a_long_prompt() -> None:
    heads = Heads(2, 1, 32)
    sequence = Sequence.random(heads, 600, torch.bfloat16, seed=6)
    clean = Sequence(heads, sequence.qkv.clone())
    sequence.qkv[:, -32:][400:] = torch.inf
    (got,), (expected,) = (attend(_OPS[2], [Share(s, 0, 600)]) for s in (sequence, clean))
    assert torch.equal(got[:400], expected[:400])
    assert not torch.isfinite(got[400:]).any()


@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(1, 1, 20), Heads(8, 1, 32)])
def test_int8_keys_and_values(heads: Heads) -> None:
    """Scales that are powers of two: what lies in the cache is exactly what bfloat16 would hold."""
    generator = torch.Generator().manual_seed(8)
    length, blocks = 300, 19
    held = [torch.randint(-127, 128, (blocks, 1, 16, heads.dim), generator=generator).to(torch.int8) for _ in range(2)]
    scales = [torch.exp2(torch.randint(-8, -5, (blocks, 1, 16), generator=generator).float()) for _ in range(2)]
    plain = [(x * s[..., None]).bfloat16() for x, s in zip(held, scales, strict=True)]
    qkv = torch.randn(length, (heads.queries + 2) * heads.dim, generator=generator).bfloat16()
    table = torch.arange(blocks, dtype=torch.int32)[None]

    def rows(start: int, end: int, *, integers: bool) -> torch.Tensor:
        starts, lens = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        k, v = held if integers else plain
        return _OPS[2].attention(
            qkv[start:end].contiguous(), heads.queries, 1, heads.dim, k, v, starts, lens, table, 0.2, None,
            (scales[0], scales[1]) if integers else None,
        )  # fmt: skip

    whole = rows(0, length, integers=True)
    torch.testing.assert_close(whole.float(), rows(0, length, integers=False).float(), rtol=0, atol=6e-3)
    assert torch.equal(rows(290, 291, integers=True)[0], whole[290])
