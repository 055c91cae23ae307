"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liushui.errors import ModelError
from liushui.kernels.policy import KernelPolicy, Linear
from liushui.layers.attention import Attention, AttentionShape
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.weights import Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def take(cls, weights: Weights, prefix: str, size: int) -> LayerNorm:
        return cls(weights.take(f"{prefix}.weight", size), weights.take(f"{prefix}.bias", size))


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: LayerNorm
    attention: Attention
    post_norm: LayerNorm
    up: Linear
    down: Linear


class GPT2:
    """The packed rows' positions index the learned table: padding or batching cannot shift them."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, policy: KernelPolicy, max_positions: int) -> None:
        if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ModelError(
                f"config: activation_function {config['activation_function']!r} is not supported (gelu_new)"
            )
        for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            if config.get(key):
                raise ModelError(f"config: {key} is not supported")
        self.policy, self.ops = policy, policy.ops
        self.hidden, self.heads = int(config["n_embd"]), int(config["n_head"])
        self.inner = int(config.get("n_inner") or 4 * self.hidden)
        self.eps = float(config.get("layer_norm_epsilon", 1e-5))
        vocab, positions = int(config["vocab_size"]), int(config["n_positions"])
        self.shape = self._attention_shape(bool(config.get("scale_attn_weights", True)))
        self.prefix = weights.strip_prefix("transformer.")
        table = weights.take_linear([f"{self.prefix}wte.weight"], [vocab], self.hidden)
        self.positions = weights.take(f"{self.prefix}wpe.weight", positions, self.hidden)
        self.layers = [self._layer(weights, f"{self.prefix}h.{i}") for i in range(int(config["n_layer"]))]
        self.norm = LayerNorm.take(weights, f"{self.prefix}ln_f", self.hidden)
        if config.get("tie_word_embeddings", True):
            weights.drop("lm_head.weight")
            self.head = policy.linear(table)
            self.tokens = policy.table(table, weights.dtype, self.head)
        else:
            self.head = policy.linear(weights.take_linear(["lm_head.weight"], [vocab], self.hidden))
            self.tokens = policy.table(table, weights.dtype)

    def _attention_shape(self, scaled: bool) -> AttentionShape:
        head_dim = self.hidden // self.heads
        return AttentionShape(self.heads, self.heads, head_dim, head_dim**-0.5 if scaled else 1.0)

    def _linear(self, weights: Weights, prefix: str, inputs: int, outputs: int) -> Linear:
        """GPT-2's files hold [inputs, outputs]."""
        weight = weights.take(f"{prefix}.weight", inputs, outputs).T.contiguous()
        return self.policy.linear(weight, weights.take(f"{prefix}.bias", outputs))

    def _layer(self, weights: Weights, prefix: str) -> Layer:
        h = self.hidden
        qkv = self._linear(weights, f"{prefix}.attn.c_attn", h, 3 * h)
        output = self._linear(weights, f"{prefix}.attn.c_proj", h, h)
        return Layer(
            input_norm=LayerNorm.take(weights, f"{prefix}.ln_1", h),
            attention=Attention(self.policy, self.shape, qkv, output, rope=None),
            post_norm=LayerNorm.take(weights, f"{prefix}.ln_2", h),
            up=self._linear(weights, f"{prefix}.mlp.c_fc", h, self.inner),
            down=self._linear(weights, f"{prefix}.mlp.c_proj", self.inner, h),
        )

    def _norm(self, norm: LayerNorm, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.eps, residual)

    def forward(self, kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        """The batch's T token ids -> hidden states [T, H] after the last norm; keys and values go to `kv`."""
        residual = self.tokens(batch.ids) + self.positions[batch.positions]
        x = self._norm(self.layers[0].input_norm, residual)
        for index, layer in enumerate(self.layers):
            attended = layer.attention(x, index, kv, batch)
            inner = self.ops.gelu_new(layer.up(self._norm(layer.post_norm, attended, residual)))
            following = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.norm
            x = self._norm(following, layer.down(inner), residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> [R, vocab] in the arithmetic type."""
        return self.head(hidden)
