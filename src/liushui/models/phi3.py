"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219, 2412.08905): Llama with its products stacked in the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from liushui.kernels.quantised import Quantised
from liushui.layers.attention import AttentionShape
from liushui.layers.weights import Weights
from liushui.models.llama import Mistral

if TYPE_CHECKING:
    import torch


class Phi3(Mistral):
    """The rotation may leave a part of each head alone; the config names it, and the table is narrower."""

    def biases(self) -> tuple[bool, bool]:
        return False, False

    def qkv_weight(self, weights: Weights, prefix: str, shape: AttentionShape) -> torch.Tensor | Quantised:
        return weights.take_linear([f"{prefix}.qkv_proj.weight"], [sum(shape.qkv_rows)], self.config.hidden_size)

    def gate_up_weight(self, weights: Weights, prefix: str, inner: int) -> torch.Tensor | Quantised:
        return weights.take_linear([f"{prefix}.gate_up_proj.weight"], [2 * inner], self.config.hidden_size)
