"""Llama 2 and 3, SmolLM2, TinyLlama, Mistral (arXiv:2302.13971, 2307.09288, 2407.21783, 2310.06825)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from liushui.errors import ModelError
from liushui.kernels.policy import KernelPolicy
from liushui.layers.attention import AttentionShape
from liushui.layers.decoder import Decoder
from liushui.layers.weights import Weights


class Llama(Decoder):
    """The plain decoder; some checkpoints put biases on the attention's products."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, policy: KernelPolicy, max_positions: int) -> None:
        if config.get("mlp_bias"):
            raise ModelError("config: mlp_bias is not supported")
        super().__init__(config, weights, policy, max_positions)

    @staticmethod
    def biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
        biased = bool(config.get("attention_bias", False))
        return biased, biased


class Mistral(Llama):
    """Llama with an optional sliding window on every layer."""

    def attention_shape(self, layer: int) -> AttentionShape:
        return replace(super().attention_shape(layer), window=self.source.get("sliding_window"))
