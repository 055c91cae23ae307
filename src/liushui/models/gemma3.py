"""Gemma 3, text (arXiv:2503.19786): five layers with a sliding window to one that sees all, norms on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from liushui.errors import ModelError
from liushui.layers.attention import AttentionShape
from liushui.layers.blocks import Activation, DecoderLayer, RMSNorm, Then
from liushui.layers.rotary import rope_table
from liushui.layers.weights import Weights
from liushui.models.llama import Llama

if TYPE_CHECKING:
    import torch

SLIDING, FULL = "sliding_attention", "full_attention"


class Gemma3(Llama):
    """The two kinds of layer rotate by different angles. Norm weights are stored as their distance from 1."""

    defaults: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}

    def pick_activation(self) -> Activation:
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if self.source.get(key):
                raise ModelError(f"config: {key} is not supported")
        name = self.source.get("hidden_activation") or self.source.get("hidden_act") or "gelu_pytorch_tanh"
        if name != "gelu_pytorch_tanh":
            raise ModelError(f"config: hidden_activation {name!r} is not supported (gelu_pytorch_tanh)")
        return self.ops.gelu_tanh_mul

    def kind(self, layer: int) -> str:
        """Whether a layer is SLIDING or FULL."""
        if kinds := self.source.get("layer_types"):
            if len(kinds) < self.config.num_layers or not set(kinds) <= {SLIDING, FULL}:
                raise ModelError(f"config: layer_types must name {SLIDING} or {FULL} for each layer")
            return str(kinds[layer])
        every = self.source.get("sliding_window_pattern") or self.source.get("_sliding_window_pattern") or 6
        return SLIDING if (layer + 1) % int(every) else FULL

    def rope_tables(self, weights: Weights, max_positions: int) -> Sequence[torch.Tensor]:
        tables = {
            kind: weights.place(rope_table(self.rope_config(kind), self.config.head_dim, max_positions))
            for kind in (SLIDING, FULL)
        }
        return [tables[self.kind(layer)] for layer in range(self.config.num_layers)]

    def rope_config(self, kind: str) -> Mapping[str, Any]:
        """Either by kind, or (older files) scaling for the full layers only and a base for each."""
        if by_kind := self.source.get("rope_parameters"):
            if kind not in by_kind:
                raise ModelError(f"config: rope_parameters has nothing for {kind}")
            rope = dict(by_kind[kind])
        elif kind == FULL:
            rope = {"rope_theta": self.source.get("rope_theta"), **(self.source.get("rope_scaling") or {})}
        else:
            rope = {"rope_theta": self.source.get("rope_local_base_freq")}
        rope["rope_theta"] = rope.get("rope_theta") or (1e6 if kind == FULL else 1e4)
        return {"rope_parameters": rope, "max_position_embeddings": self.config.max_positions}

    def take_norm(self, weights: Weights, name: str, size: int) -> RMSNorm:
        return replace(super().take_norm(weights, name, size), unit_offset=True)

    def attention_shape(self, layer: int) -> AttentionShape:
        scale = float(self.source.get("query_pre_attn_scalar", 256)) ** -0.5
        window = self.source.get("sliding_window") if self.kind(layer) == SLIDING else None
        return replace(super().attention_shape(layer), scale=scale, window=window)

    def head_norms(self, weights: Weights, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        query, key = (
            (1.0 + weights.take(f"{prefix}.{name}_norm.weight", self.config.head_dim, dtype=torch.float32))
            for name in "qk"
        )
        return query.to(weights.dtype), key.to(weights.dtype)

    def layer(self, weights: Weights, layer: int, prefix: str) -> DecoderLayer:
        def norm(name: str) -> RMSNorm:
            return self.take_norm(weights, f"{prefix}.{name}_layernorm", self.config.hidden_size)

        before_attention = norm("input")
        attention = self.attention(weights, layer, f"{prefix}.self_attn")
        after_attention, before_mlp = norm("post_attention"), norm("pre_feedforward")
        mlp, after_mlp = self.mlp(weights, layer, prefix), norm("post_feedforward")
        return DecoderLayer(
            before_attention, Then(attention, after_attention.alone), before_mlp, Then(mlp, after_mlp.alone)
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Scaled by the root of the width, rounded to the arithmetic type as in training."""
        import torch

        rows = super().embed(ids)
        return rows.mul_(float(torch.tensor(self.config.hidden_size**0.5, dtype=rows.dtype)))
