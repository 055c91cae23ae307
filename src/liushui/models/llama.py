"""Llama 2 and 3, SmolLM2, TinyLlama, Mistral (arXiv:2302.13971, 2307.09288, 2407.21783, 2310.06825)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from liushui.errors import ModelError
from liushui.layers.attention import AttentionShape
from liushui.layers.decoder import Decoder
from liushui.layers.weights import Weights

if TYPE_CHECKING:
    import torch


class Llama(Decoder):
    """The plain decoder; some checkpoints put biases on the attention's products."""

    def biases(self) -> tuple[bool, bool]:
        biased = bool(self.source.get("attention_bias", False))
        return biased, biased

    def mlp(self, weights: Weights, layer: int, prefix: str) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.source.get("mlp_bias"):
            raise ModelError("config: mlp_bias is not supported")
        return super().mlp(weights, layer, prefix)


class Mistral(Llama):
    """Llama with an optional sliding window on every layer."""

    def attention_shape(self, layer: int) -> AttentionShape:
        return replace(super().attention_shape(layer), window=self.source.get("sliding_window"))
