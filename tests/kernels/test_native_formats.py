"""Products with bfloat16 and integer weights: values, one order of sums for any rows and threads, look-ups of rows.

With every instruction set that this machine has, and with those in software that it may not have.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels.native import NativeOps
from liushui.kernels.native_linear import NativeLinear, NativeProducts
from liushui.kernels.quantised import Quantised, QuantisedRows
from tests.kernels import emulated
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.kernels.quant_support import KINDS, random_rows, rounded

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
EMULATED = [f"emulated {name}" for name in emulated.SETS]
PATHS = [name for name in IMPLEMENTATIONS if name != "torch"] + EMULATED
FORMATS = (*KINDS, "bfloat16", "int8", "int4")
ROWS = (*range(1, 71), 128, 512)


def ops_of(path: str, threads: int = 1) -> NativeProducts:
    if path.startswith("emulated"):
        return emulated.products(path.split()[1], threads)
    return NativeOps(threads, path).products


def weight_of(form: str, outputs: int, inputs: int, seed: int = 0) -> torch.Tensor | Quantised:
    if form in KINDS:
        return random_rows(form, outputs, inputs, seed)
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16() if form == "bfloat16" else values


def pack(
    ops: NativeProducts, form: str, weight: torch.Tensor | Quantised, bias: torch.Tensor | None = None
) -> NativeLinear:
    return ops.pack(weight, bias, form if form in ("int8", "int4") else None)


def inputs_of(form: str, choice: int) -> int:
    block = 256 if form in ("Q4_K", "Q6_K") else 32 if form in KINDS else 1
    return ((1, 31, 65, 99, 320) if block == 1 else (block, 3 * block, 2 * block, block, 4 * block))[choice]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=6)
@given(data=st.data())
def test_values_and_bits(path: str, form: str, data: st.DataObject) -> None:
    """Random shapes against float64; random pieces of the rows, alone, with other threads: the same bits."""
    outputs, choice = data.draw(st.sampled_from([1, 15, 16, 17, 33, 70])), data.draw(st.integers(0, 4))
    rows, dtype = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inputs, seed = inputs_of(form, choice), data.draw(st.integers(0, 99))
    single, several = ops_of(path, 1), ops_of(path, data.draw(st.integers(1, 3)))
    weight = weight_of(form, outputs, inputs, seed)
    bias = torch.randn(outputs) if data.draw(st.booleans()) else None
    packed = pack(single, form, weight, bias)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = several.linear(x, packed)
    exact = single.embed(torch.arange(outputs), packed, torch.float32).double()
    seen = x.double() if form == "bfloat16" else rounded(x)
    expected = seen @ exact.T + (0.0 if bias is None else bias.double())
    size = (seen.abs() @ exact.abs().T).amax() + 1.0  # x in the middle between two integers may go either way
    torch.testing.assert_close(
        whole.double(), expected, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=size * 1e-4
    )
    start = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(start + 1, rows))
    assert torch.equal(single.linear(x[start:end].contiguous(), packed), whole[start:end])


@pytest.mark.parametrize("form", ["Q8_0", "Q4_1", "Q6_K", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_is_the_same_in_any_company(path: str, form: str) -> None:
    ops, others = ops_of(path, 1), ops_of(path, 3)
    packed = pack(ops, form, weight_of(form, 37, 512))
    x = torch.randn(max(ROWS), 512)
    x *= 2.0 ** torch.randint(-12, 13, x.shape)  # every addition has to round
    x = x.bfloat16()
    whole = ops.linear(x, packed)
    for rows in ROWS:
        assert torch.equal(others.linear(x[:rows].contiguous(), packed), whole[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:].contiguous(), packed), whole[-rows:]), rows


@pytest.mark.parametrize("path", PATHS)
def test_sums_of_extreme_integers_do_not_saturate(path: str) -> None:
    """The largest values with the largest rows: what 16 bits would not hold."""
    ops = ops_of(path)
    for form, bound in (("int8", 127.0), ("int4", -8.0)):
        for signs in ((1.0, 1.0), (1.0, -1.0)):
            weight = torch.full((16, 64), bound) * torch.tensor(signs).repeat(32)
            packed = pack(ops, form, weight)
            for rows in (1, 2, 5, 20):
                x = torch.full((rows, 64), 127.0) * torch.tensor(signs).repeat(32)
                expected = torch.full((rows, 16), 64 * 127.0 * bound)
                assert torch.equal(ops.linear(x, packed), expected if form == "int8" else ops.linear(x, packed))
                exact = ops.embed(torch.arange(16), packed, torch.float32)
                torch.testing.assert_close(ops.linear(x, packed), x @ exact.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", PATHS)
def test_looked_up_rows_are_the_dequantised_ones(path: str, form: str) -> None:
    ops, inputs = ops_of(path), inputs_of(form, 1)
    weight = weight_of(form, 35, inputs)
    packed = pack(ops, form, weight)
    ids = torch.tensor([34, 0, 16, 15, 16])
    if form in KINDS:
        assert isinstance(weight, Quantised)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ops.embed(ids, packed, dtype), weight.dequantise(dtype)[ids])
    elif form == "bfloat16":
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(ops.embed(ids, packed, torch.bfloat16), weight[ids])
    else:
        assert isinstance(weight, torch.Tensor)
        groups = torch.nn.functional.pad(weight, (0, -inputs % 32)).unflatten(1, (-1, 32)).abs().amax(-1)
        step = groups / (127 if form == "int8" else 8)
        error = (ops.embed(ids, packed, torch.float32) - weight[ids]).abs()
        allowed = step.repeat_interleave(32, 1)[ids, :inputs] * (0.51 if form == "int8" else 1.01)
        assert (error <= allowed).all()
    for wrong in (-1, 35):
        with pytest.raises(IndexError, match="outside"):
            ops.embed(torch.tensor([0, wrong]), packed, torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_stacked_weights_of_several_types(path: str) -> None:
    """As query, key and value of one layer may come: each column as from its own weight."""
    ops = ops_of(path, 2)
    pieces = [random_rows("Q4_K", 40, 256, 1), random_rows("Q4_K", 24, 256, 2), random_rows("Q6_K", 17, 256, 3)]
    whole = Quantised.stack(pieces)
    assert [part.shape for part in whole.parts] == [(64, 256), (17, 256)]
    bias = torch.randn(81)
    packed = pack(ops, "", whole, bias)
    x = torch.randn(23, 256)
    apart = [ops.linear(x, pack(ops, "", piece)) for piece in pieces]
    assert torch.equal(ops.linear(x, packed), torch.cat(apart, 1) + bias)
    assert torch.equal(ops.embed(torch.tensor([63, 64, 80]), packed, torch.float32)[1:],
                       pieces[2].dequantise(torch.float32)[[0, 16]])  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", PATHS)
def test_not_finite_rows_stay_alone(path: str, form: str) -> None:
    ops, inputs = ops_of(path), inputs_of(form, 1)
    packed = pack(ops, form, weight_of(form, 20, inputs))
    x = torch.randn(21, inputs)
    clean = ops.linear(x, packed)
    x[4, 3], x[9, 0], x[11] = torch.nan, torch.inf, 0.0
    spoiled = ops.linear(x, packed)
    assert not spoiled[[4, 9]].isfinite().all(1).any()
    assert (spoiled[11] == 0).all()
    keep = [row for row in range(21) if row not in (4, 9, 11)]
    assert torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_refused(path: str) -> None:
    ops = ops_of(path)
    with pytest.raises(ValueError, match="cannot"):
        pack(ops, "int4", random_rows("Q8_0", 16, 32))
    for kind, shape in (("Q8_0", (16, 96)), ("Q8_0", (17, 64)), ("Q4_K", (1, 255)), ("Q4_1", (16, 33))):
        part = QuantisedRows(random_rows("Q8_0", 16, 64).parts[0].rows, kind, shape, lambda dtype: torch.empty(0))
        with pytest.raises(ValueError, match=r"are not \["):  # more than the memory holds
            ops.pack(Quantised((part,)))
    packed = pack(ops, "Q8_0", random_rows("Q8_0", 16, 64))
    assert ops.linear(torch.empty(0, 64), packed).shape == (0, 16)
    for x in (torch.randn(2, 63), torch.randn(2, 64).half(), torch.randn(64, 2).T):
        with pytest.raises(ValueError, match=r"linear|native kernels"):
            ops.linear(x, packed)
    with pytest.raises(ValueError, match=r"\[N\]"):
        ops.linear(torch.randn(2, 64), packed, torch.randn(15))


def test_float32_rows_with_bfloat16_weights_are_the_same_everywhere() -> None:
    """Some instructions take bfloat16 alone; such rows are not rounded for them."""
    for inputs in (1, 31, 64, 99, 321):
        weight, x = weight_of("bfloat16", 37, inputs), torch.randn(21, inputs)
        first, *others = (ops.linear(x, ops.pack(weight)) for ops in map(ops_of, EMULATED))
        assert all(torch.equal(other, first) for other in others)
