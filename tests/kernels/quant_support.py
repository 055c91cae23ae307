"""Random weights in GGUF's types, and their products in float64 as the native kernels round x."""

import numpy as np
import torch

from liushui.kernels.quantised import Quantised, QuantisedRows
from liushui.loading.gguf_quants import dequantise
from liushui.loading.gguf_types import TYPES, TensorType

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0")
_BY_NAME = {kind.name: kind for kind in TYPES.values()}
_HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
"""Where a block has float16 numbers."""


def random_rows(kind: str, rows: int, inputs: int, seed: int = 0) -> Quantised:
    """[rows, inputs]: any bytes, with scales of usual size."""
    type_, luck = _BY_NAME[kind], np.random.default_rng(seed)
    blocks = luck.integers(0, 256, (rows * inputs // type_.block, type_.nbytes), dtype=np.uint8)
    for at in _HALVES[kind]:
        scales = (luck.standard_normal(len(blocks)) * 0.02).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return quantised(blocks.reshape(rows, -1), type_, (rows, inputs))


def quantised(packed: np.ndarray, kind: TensorType, shape: tuple[int, int]) -> Quantised:
    rows = QuantisedRows(
        torch.from_numpy(packed), kind.name, shape, lambda dtype: dequantise(packed, kind, dtype, "test").reshape(shape)
    )
    return Quantised((rows,))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] in 16 bits (at most 127 * 256) with a scale for each 32, as float64."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 32512 / largest, 0.0)
    values = (padded * inverse).round().double() * (largest / 32512).double()
    return values.flatten(1)[:, : x.shape[1]]
