"""GGUF's types unpacked by the native library: bit for bit the values of `gguf`, in every packed form."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels.arrays import Array
from liushui.kernels.native import NativeOps
from liushui.kernels.native_linear import SOURCES, UNPACKED
from liushui.kernels.quantised import Quantised, QuantisedRows
from tests.kernels import emulated
from tests.kernels.conftest import IMPLEMENTATIONS

KINDS = [*SOURCES, *UNPACKED]
NATIVE = [name for name in IMPLEMENTATIONS if name != "torch"]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


def native(isa: str) -> NativeOps:
    ops = IMPLEMENTATIONS[isa]
    assert isinstance(ops, NativeOps)
    return ops


def any_bytes(kind: str, rows: int, inputs: int, seed: int) -> tuple[QuantisedRows, torch.Tensor]:
    """Rows of any bytes (scales may be subnormal, infinite or NaN), and what the reference makes of them."""
    type_ = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[type_]
    packed = np.random.default_rng(seed).integers(0, 256, (rows, inputs // block * nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = {"F32": np.float32, "F16": np.float16}.get(kind)
        expected = gguf.quants.dequantize(packed, type_) if values is None else packed.view(values).astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(expected, np.float32))
    return QuantisedRows(Array(packed), kind, (rows, inputs), tensor.to), tensor


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaN equals NaN; -0 is not 0."""
    nan = found.isnan()
    if not torch.equal(nan, expected.isnan()):
        return False
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(found[~nan].view(kind), expected[~nan].view(kind))


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_values_are_the_references(isa: str, kind: str, rows: int, blocks: int, seed: int) -> None:
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    part, expected = any_bytes(kind, rows, block * blocks, seed)
    for dtype in ("float32", "bfloat16"):
        found = native(isa).products.unpack(part, dtype).tensor()
        assert same_bits(found, expected.to(getattr(torch, dtype)))


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_packed_from_rows_as_from_values(isa: str, kind: str, form: str) -> None:
    """33 rows: the last panel is partly filled."""
    ops, (part, expected) = native(isa), any_bytes(kind, 33, 512, 5)
    values = torch.nan_to_num(expected.to(getattr(torch, form)), posinf=1.0, neginf=-1.0)
    packed = ops.pack_linear(Quantised((part,), form))
    plain = ops.pack_linear(expected.to(getattr(torch, form)).contiguous())
    assert packed is not None
    assert plain is not None
    assert packed.kind == plain.kind
    ids = torch.arange(33)
    found, known = (ops.embed(ids, weight, values.dtype) for weight in (packed, plain))
    assert same_bits(found, known)
    assert same_bits(found, expected.to(values.dtype))


@pytest.mark.parametrize("isa", ["avx512bf16", "amx"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "F16", "F32", "BF16"])
def test_tiles_packed_from_rows(kind: str, isa: str) -> None:
    """The layouts of bfloat16, by the emulation; subnormals (of F32 and BF16) stay."""
    products, (part, expected) = emulated.products(isa, 2), any_bytes(kind, 33, 512, 6)
    packed = products.pack(Quantised((part,), "bfloat16"))
    found = products.embed(torch.arange(33), packed, torch.bfloat16)
    assert same_bits(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize("isa", NATIVE)
def test_products_of_stacked_rows(isa: str) -> None:
    """Two types below each other, in one product."""
    ops, luck = native(isa), np.random.default_rng(0)

    def rows(kind: str, count: int) -> QuantisedRows:
        type_ = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(luck.standard_normal((count, 256), np.float32), type_)
        return QuantisedRows(Array(packed), kind, (count, 256), lambda dtype: torch.empty(0))

    parts = [rows("Q8_0", 20), rows("Q4_1", 24)]
    values = torch.cat([ops.products.unpack(part, "float32").tensor() for part in parts])
    packed = ops.pack_linear(Quantised.stack([Quantised((part,)) for part in parts], "float32"))
    x = torch.from_numpy(luck.standard_normal((7, 256), np.float32))
    plain = ops.pack_linear(values)
    assert packed is not None
    assert plain is not None
    assert torch.equal(ops.linear(x, packed), ops.linear(x, plain))
    wrapped: Any = ops.linear(Array(x.numpy()), packed)  # type: ignore[arg-type]
    assert torch.equal(wrapped.tensor(), ops.linear(x, plain))


@pytest.mark.parametrize("isa", NATIVE)
def test_wrong_sizes_are_refused(isa: str) -> None:
    products = native(isa).products
    with pytest.raises(ValueError, match="17 bytes of Q4_0 are not"):
        products.unpack(QuantisedRows(Array(np.zeros((1, 17), np.uint8)), "Q4_0", (1, 32), torch.empty), "float32")
    with pytest.raises(ValueError, match="no product for IQ2_XS"):
        products.unpack(QuantisedRows(Array(np.zeros((1, 74), np.uint8)), "IQ2_XS", (1, 256), torch.empty), "float32")
    with pytest.raises(ValueError, match="no product for Q5_K"):
        products.pack(Quantised((QuantisedRows(Array(np.zeros((1, 176), np.uint8)), "Q5_K", (1, 256), torch.empty),)))
