"""The native product: the right values, and each element summed in one order whatever the shape of the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels.ops import Ops, load_ops
from tests.kernels.conftest import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
NATIVE = [name for name in IMPLEMENTATIONS if name != "torch"]
SHAPES = [(1, 1), (33, 7), (48, 64), (100, 1600), (17, 1), (31, 769), (160, 48)]


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    rows=st.integers(1, 130),
    threads=st.integers(1, 3),
    bias=st.booleans(),
    data=st.data(),
)
def test_values_and_bits(name: str, shape: tuple[int, int], rows: int, threads: int, bias: bool, data) -> None:
    ops, single = load_ops("native", threads, isa=name), load_ops("native", 1, isa=name)
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(*shape, generator=generator), torch.randn(rows, shape[1], generator=generator)
    added = torch.randn(shape[0], generator=generator) if bias else None
    packed = ops.pack_linear(weight)
    assert packed is not None
    whole = ops.linear(x, packed, added)
    expected = x.double() @ weight.double().T + (added.double() if bias else 0.0)
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=2e-6 * (1 + shape[1]))
    start = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(start + 1, rows))
    assert torch.equal(single.linear(x[start:end].contiguous(), packed, added), whole[start:end])


@pytest.mark.parametrize("name", NATIVE)
def test_a_column_does_not_depend_on_how_many_there_are(name: str) -> None:
    """Also where it falls into the last, narrower panel."""
    ops = IMPLEMENTATIONS[name]
    weight, x = torch.randn(70, 900), torch.randn(5, 900)
    whole = ops.linear(x, ops.pack_linear(weight))
    for columns in (1, 15, 16, 33, 69):
        assert torch.equal(ops.linear(x, ops.pack_linear(weight[:columns].contiguous())), whole[:, :columns])


def test_no_rows_and_types_without_a_product(ops: Ops) -> None:
    packed = ops.pack_linear(torch.randn(20, 8))
    if packed is None:
        assert ops.name == "torch"
    else:
        assert (packed.out_features, packed.in_features) == (20, 8)
        assert ops.linear(torch.empty(0, 8), packed).shape == (0, 20)


@pytest.mark.parametrize("name", NATIVE)
def test_not_finite_rows_stay_alone(name: str) -> None:
    ops = IMPLEMENTATIONS[name]
    packed = ops.pack_linear(torch.randn(40, 64))
    x = torch.randn(9, 64)
    clean = ops.linear(x, packed)
    x[4, 3] = torch.nan
    spoiled = ops.linear(x, packed)
    assert torch.isnan(spoiled[4]).all()
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize("name", NATIVE)
def test_wrong_shapes_are_refused(name: str) -> None:
    ops = IMPLEMENTATIONS[name]
    packed = ops.pack_linear(torch.randn(40, 64))
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        ops.linear(torch.randn(2, 63), packed)
    with pytest.raises(ValueError, match=r"\[N\]"):
        ops.linear(torch.randn(2, 64), packed, torch.randn(41))
    other = load_ops("torch", 1)
    with pytest.raises(ValueError, match="cannot read"):
        other.linear(torch.randn(2, 64), packed)
