"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115) and Qwen3 (arXiv:2505.09388)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from liushui.layers.attention import AttentionShape
from liushui.layers.decoder import Decoder
from liushui.layers.weights import Weights

if TYPE_CHECKING:
    import torch


class Qwen2(Decoder):
    """Biases on q, k and v; a sliding window on the layers that the config names."""

    def biases(self) -> tuple[bool, bool]:
        return True, False

    def attention_shape(self, layer: int) -> AttentionShape:
        shape = super().attention_shape(layer)
        if not self.source.get("use_sliding_window"):
            return shape
        kinds = self.source.get("layer_types")
        if kinds is not None:
            sliding = kinds[layer] == "sliding_attention"
        else:
            sliding = layer >= int(self.source.get("max_window_layers") or 0)
        return replace(shape, window=self.source.get("sliding_window")) if sliding else shape


class Qwen3(Qwen2):
    """RMSNorm on each head of q and k before the rotation; biases only where the config says so."""

    def biases(self) -> tuple[bool, bool]:
        biased = bool(self.source.get("attention_bias", False))
        return biased, biased

    def head_norms(self, weights: Weights, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.head_dim
        return weights.take(f"{prefix}.q_norm.weight", size), weights.take(f"{prefix}.k_norm.weight", size)
