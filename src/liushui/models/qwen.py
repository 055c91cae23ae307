"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115) and Qwen3 (arXiv:2505.09388), dense."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from liushui.layers.attention import AttentionShape
from liushui.layers.decoder import Decoder


class Qwen2(Decoder):
    """Biases on q, k and v; a sliding window on the layers that the config names."""

    @staticmethod
    def biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
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

    qk_norm = True

    @staticmethod
    def biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
        biased = bool(config.get("attention_bias", False))
        return biased, biased
