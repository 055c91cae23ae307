"""Mixtral (arXiv:2401.04088) and Qwen3-MoE (arXiv:2505.09388): the MLP of a layer is a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from liushui.errors import ModelError
from liushui.layers.attention import AttentionShape
from liushui.layers.blocks import GatedMLP
from liushui.layers.experts import Experts, Router
from liushui.layers.weights import Weights
from liushui.models.llama import Mistral
from liushui.models.qwen import Qwen3

if TYPE_CHECKING:
    import torch


def _count(config: Mapping[str, Any], *names: str) -> int:
    """The first of `names` that the config has."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ModelError(f"config: key '{names[0]}' is missing")


class Mixtral(Mistral):
    """Mistral with experts in every layer; the weights of the chosen ones sum to 1."""

    def mlp(self, weights: Weights, layer: int, prefix: str) -> Callable[[torch.Tensor], torch.Tensor]:
        c, prefix = self.config, f"{prefix}.block_sparse_moe"
        count = _count(self.source, "num_local_experts", "num_experts")
        gate = self.policy.linear(weights.take(f"{prefix}.gate.weight", count, c.hidden_size), exact=True)
        router = Router(gate, _count(self.source, "num_experts_per_tok"), normalise=True)
        return Experts(router, [self.expert(weights, f"{prefix}.experts.{i}") for i in range(count)])

    def expert(self, weights: Weights, prefix: str) -> GatedMLP:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        gate_up = weights.take_linear([f"{prefix}.w1.weight", f"{prefix}.w3.weight"], [inner, inner], hidden)
        down = weights.take_linear([f"{prefix}.w2.weight"], [hidden], inner)
        return GatedMLP(self.policy.linear(gate_up), self.activation, self.policy.linear(down))


class Qwen3Moe(Qwen3):
    """Qwen3 with narrow experts, in every layer or in those that the config names."""

    def attention_shape(self, layer: int) -> AttentionShape:
        shape = super(Qwen3, self).attention_shape(layer)
        window = self.source.get("sliding_window") if self.source.get("use_sliding_window") else None
        return replace(shape, window=window)

    def mlp(self, weights: Weights, layer: int, prefix: str) -> Callable[[torch.Tensor], torch.Tensor]:
        count = _count(self.source, "num_experts", "num_local_experts")  # the second in newer files
        every = int(self.source.get("decoder_sparse_step") or 1)
        if layer in (self.source.get("mlp_only_layers") or ()) or count == 0 or (layer + 1) % every:
            return super().mlp(weights, layer, prefix)
        prefix, inner = f"{prefix}.mlp", _count(self.source, "moe_intermediate_size")
        gate = self.policy.linear(weights.take(f"{prefix}.gate.weight", count, self.config.hidden_size), exact=True)
        router = Router(gate, _count(self.source, "num_experts_per_tok"), bool(self.source.get("norm_topk_prob")))
        return Experts(router, [self.gated(weights, f"{prefix}.experts.{i}", inner) for i in range(count)])
