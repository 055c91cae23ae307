"""Checkpoints whose matrices are quantised as in a GGUF file, of several types."""

from dataclasses import dataclass, field
from typing import Any

import gguf.quants
import numpy as np
import torch
import transformers

from liushui.config import EngineConfig
from liushui.kernels.quantised import Quantised, QuantisedRows
from liushui.loading.gguf_quants import dequantise
from liushui.loading.gguf_types import TYPES
from liushui.runner.runner import Runner
from tests.support import tiny

KINDS = {"v_proj": "Q8_0", "down_proj": "Q5_0", "o_proj": "Q4_0", "embed_tokens": "Q8_0"}
"""By a part of the name; all others Q4_1."""
_BY_NAME = {kind.name: kind for kind in TYPES.values()}


@dataclass
class InBlocks(tiny.DictCheckpoint):
    """Every matrix in blocks; `load` dequantises them."""

    parts: dict[str, QuantisedRows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.dim() == 2:
                kind = _BY_NAME[next((kind for part, kind in KINDS.items() if part in name), "Q4_1")]
                packed = gguf.quants.quantize(tensor.detach().numpy(), gguf.GGMLQuantizationType[kind.name])
                self.parts[name] = _rows(np.ascontiguousarray(packed), kind, tuple(tensor.shape))

    def block_types(self) -> frozenset[str]:
        return frozenset(part.kind for part in self.parts.values())

    def load_blocks(self, name: str) -> Quantised | None:
        return Quantised((self.parts[name],)) if name in self.parts else None

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        part = self.parts.get(name)
        return super().load(name, dtype) if part is None else part.dequantise(dtype)


def _rows(packed: np.ndarray, kind: Any, shape: tuple[int, int]) -> QuantisedRows:
    return QuantisedRows(
        torch.from_numpy(packed), kind.name, shape, lambda dtype: dequantise(packed, kind, dtype, "test").reshape(shape)
    )


def oracle(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """With rows of whole blocks."""
    return tiny.oracle(family, seed, hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4)


def runner(model: transformers.PreTrainedModel, **settings: Any) -> Runner:
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_gib": 0.02, "threads": 1} | settings
    plain = tiny.checkpoint(model)
    return Runner.load(EngineConfig(**settings).validate(), InBlocks(plain.config, plain.tensors))
