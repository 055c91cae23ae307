"""Every type that the gguf package can decode comes out bit for bit as it decodes it."""

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from liushui.errors import ModelError
from liushui.loading.gguf_quants import dequantise
from liushui.loading.gguf_types import TYPES

FLOATS = {"F32", "F16", "BF16"}


def decodable() -> list[str]:
    return sorted({kind.name for kind in gguf.quants._type_traits} | FLOATS)


def packed(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: every pattern of scales and values, infinities and NaN among them."""
    kind = TYPES[GGMLQuantizationType[name]]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.nbytes), dtype=np.uint8)


def reference(name: str, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, GGMLQuantizationType[name])


def test_sizes_are_those_of_the_gguf_package() -> None:
    ours = {kind.id: (kind.name, kind.block, kind.nbytes) for kind in TYPES.values()}
    theirs = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", decodable())
def test_bit_for_bit(name: str) -> None:
    kind = TYPES[GGMLQuantizationType[name]]
    rows = packed(name, rows=5, blocks=3 if kind.block > 1 else 64)
    expected = reference(name, rows)
    decoded = dequantise(rows, kind, torch.float32, "t")
    assert decoded.shape == expected.shape
    np.testing.assert_array_equal(decoded.numpy(), expected)  # NaN = NaN


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_pieces_and_narrower_dtypes(name: str, dtype: torch.dtype) -> None:
    """More than one piece of the decoder, the last one short."""
    kind = TYPES[GGMLQuantizationType[name]]
    rows = packed(name, rows=70, blocks=1024 // kind.block, seed=1)
    expected = torch.from_numpy(reference(name, rows)).to(dtype)
    assert torch.equal(dequantise(rows, kind, dtype, "t").nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantise_and_back_is_close(name: str) -> None:
    """Not only the same as the reference, but the values that were meant."""
    values = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    rows = gguf.quants.quantize(values, GGMLQuantizationType[name])
    decoded = dequantise(rows, TYPES[GGMLQuantizationType[name]], torch.float32, "t").numpy()
    assert np.abs(decoded - values).max() < 0.4


@pytest.mark.parametrize("name", ["I8", "Q8_1", "Q8_K", "I32"])
def test_types_without_a_decoder_name_the_tensor(name: str) -> None:
    kind = TYPES[GGMLQuantizationType[name]]
    rows = np.zeros((1, kind.nbytes), np.uint8)
    with pytest.raises(ModelError, match=f"tensor 'blk.0.x.weight' has the type {name}"):
        dequantise(rows, kind, torch.float32, "blk.0.x.weight")


def test_the_result_owns_its_memory() -> None:
    rows = np.zeros((1, 4), np.uint8)
    decoded = dequantise(rows, TYPES[0], torch.float32, "t")
    rows[:] = 255
    assert decoded.tolist() == [[0.0]]
