"""Blocks that are multiplied as bfloat16: the bits of bfloat16 weights, for every format and number of rows.

With AMX where this machine has it, and in software.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels.native_linear import NativeLinear, NativeProducts
from liushui.kernels.quantised import AS_BFLOAT16, Quantised
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.kernels.quant_support import KINDS, random_rows
from tests.kernels.test_native_formats import ops_of

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
PATHS = [*(["amx"] if "amx" in IMPLEMENTATIONS else []), "emulated amx"]
FORMATS = (*KINDS, "int8", "int4")
ROWS = (*range(1, 71), 128, 512, 530)


def both(
    ops: NativeProducts, form: str, outputs: int, inputs: int, seed: int, bias: torch.Tensor | None = None
) -> tuple[NativeLinear, NativeLinear, torch.Tensor]:
    """Packed as blocks, packed as bfloat16, and that bfloat16 weight [N, K]."""
    if form in KINDS:
        blocks: torch.Tensor | Quantised = random_rows(form, outputs, inputs, seed)
        values = blocks.dequantise(torch.bfloat16)
        packed = ops.pack(blocks, bias, AS_BFLOAT16)
    else:
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randn(outputs, inputs, generator=generator)
        values = ops.embed(torch.arange(outputs), ops.pack(blocks, None, form), torch.bfloat16)
        packed = ops.pack(blocks, bias, form + AS_BFLOAT16)
    return packed, ops.pack(values, bias), values


def width_of(form: str, choice: int) -> int:
    if form in ("int8", "int4"):
        return (1, 31, 64, 99, 320)[choice]
    return (256, 512, 768)[choice % 3] if form in ("Q4_K", "Q6_K") else (32, 64, 96, 352, 320)[choice]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=12)
@given(data=st.data())
def test_bits_of_the_bfloat16_product(path: str, form: str, data: st.DataObject) -> None:
    """Random shapes, rows, threads and biases."""
    outputs, inputs = (
        data.draw(st.sampled_from([1, 16, 17, 31, 32, 33, 70])),
        width_of(form, data.draw(st.integers(0, 4))),
    )
    rows, seed = data.draw(st.sampled_from(ROWS)), data.draw(st.integers(0, 99))
    ops, bias = ops_of(path, data.draw(st.integers(1, 3))), torch.randn(outputs) if data.draw(st.booleans()) else None
    blocks, dense, _ = both(ops, form, outputs, inputs, seed, bias)
    x = (torch.randn(rows, inputs) * 2.0 ** torch.randint(-12, 13, (rows, inputs))).bfloat16()
    assert torch.equal(ops.linear(x, blocks), ops.linear(x, dense))


@pytest.mark.parametrize("form", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("path", PATHS)
def test_every_number_of_rows(path: str, form: str) -> None:
    ops = ops_of(path, 2)
    blocks, dense, _ = both(ops, form, 37, 256, 5)
    x = torch.randn(max(ROWS), 256).bfloat16()
    whole = ops.linear(x, dense)
    for rows in ROWS:
        assert torch.equal(ops.linear(x[:rows].contiguous(), blocks), whole[:rows]), rows
        assert torch.equal(ops.linear(x[-rows:].contiguous(), blocks), whole[-rows:]), rows


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", PATHS)
def test_expanded_weights_are_the_dequantised_ones(path: str, form: str) -> None:
    """Products with the rows of the identity, and rows looked up."""
    ops, inputs = ops_of(path), width_of(form, 3)
    blocks, _, values = both(ops, form, 45, inputs, 7)
    seen = ops.linear(torch.eye(inputs).bfloat16(), blocks)
    assert torch.equal(seen, values.T)
    ids = torch.tensor([44, 0, 31, 32, 31])
    assert torch.equal(ops.embed(ids, blocks, torch.bfloat16), values[ids])


@pytest.mark.parametrize("kinds", [("Q4_1", "Q8_0"), ("Q5_0", "Q4_0"), ("Q8_0", "Q8_0")])
@pytest.mark.parametrize("path", PATHS)
def test_stacked_weights_that_take_their_rows_in_different_forms(path: str, kinds: tuple[str, str]) -> None:
    ops = ops_of(path, 2)
    pieces = [random_rows(kind, outputs, 96, outputs) for kind, outputs in zip(kinds, (40, 33), strict=True)]
    whole = ops.pack(Quantised.stack(pieces), None, AS_BFLOAT16)
    apart = [ops.pack(piece, None, AS_BFLOAT16) for piece in pieces]
    x = torch.randn(70, 96).bfloat16()
    for rows in (1, 2, 15, 16, 17, 33, 70):
        some = x[-rows:].contiguous()
        assert torch.equal(ops.linear(some, whole), torch.cat([ops.linear(some, piece) for piece in apart], 1)), rows


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_are_not_finite_stay_alone(path: str) -> None:
    ops = ops_of(path)
    for form in FORMATS:
        inputs = width_of(form, 4)
        blocks, _, _ = both(ops, form, 20, inputs, 3)
        x = torch.randn(21, inputs).bfloat16()
        clean = ops.linear(x, blocks)
        x[4, 3], x[9, 0] = torch.nan, torch.inf
        spoiled = ops.linear(x, blocks)
        assert not spoiled[[4, 9]].isfinite().all(1).any()
        keep = [row for row in range(21) if row not in (4, 9)]
        assert torch.equal(spoiled[keep], clean[keep])


def test_what_they_are_not_for_is_refused() -> None:
    ops = ops_of("emulated amx")
    with pytest.raises(ValueError, match="one type"):
        ops.linear(torch.randn(2, 64), ops.pack(random_rows("Q4_1", 16, 64), None, AS_BFLOAT16))
    for path in ("emulated avx512", *(["avx2"] if "avx2" in IMPLEMENTATIONS else [])):
        with pytest.raises(ValueError, match="cannot be held"):
            ops_of(path).pack(random_rows("Q4_1", 16, 64), None, AS_BFLOAT16)
