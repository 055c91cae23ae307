"""Granite 3 (IBM, github.com/ibm-granite): Llama with four multipliers, after muP (arXiv:2203.03466)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from liushui.layers.attention import AttentionShape
from liushui.layers.blocks import DecoderLayer, Scale, Then
from liushui.layers.weights import Weights
from liushui.models.llama import Llama

if TYPE_CHECKING:
    import torch


class Granite(Llama):
    """Embeddings, attention scores, what a sub-layer adds, and logits are scaled by numbers of the config."""

    def factor(self, name: str) -> float:
        return float(self.source.get(name, 1.0))

    def attention_shape(self, layer: int) -> AttentionShape:
        return replace(super().attention_shape(layer), scale=self.factor("attention_multiplier"))

    def layer(self, weights: Weights, layer: int, prefix: str) -> DecoderLayer:
        made, scale = super().layer(weights, layer, prefix), Scale(self.factor("residual_multiplier"))
        return replace(made, attention=Then(made.attention, scale), mlp=Then(made.mlp, scale))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return super().embed(ids).mul_(self.factor("embedding_multiplier"))

    @property
    def logits_divisor(self) -> float:
        return self.factor("logits_scaling")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden).div_(self.logits_divisor)
