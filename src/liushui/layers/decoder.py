"""The pre-norm decoder that Llama, Mistral and the Qwen families share: RMSNorm, rotary attention, SwiGLU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from liushui.errors import ModelError
from liushui.kernels.policy import KernelPolicy
from liushui.layers.attention import Attention, AttentionShape
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.rotary import rope_table
from liushui.layers.weights import Weights


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes of a decoder, from the keys of a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    tied: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            read = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                max_positions=int(config["max_position_embeddings"]),
                eps=float(config["rms_norm_eps"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise ModelError(f"config: key {missing} is missing") from None
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ModelError(f"config: hidden_act {config['hidden_act']!r} is not supported by this family (silu)")
        return read


class GatedMLP:
    """x [T, H] -> [T, H]: silu(x Wg) * (x Wu), then Wd (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, policy: KernelPolicy, weights: Weights, prefix: str, hidden: int, inner: int) -> None:
        gate_up = weights.take_rows([f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"], [inner] * 2, hidden)
        self.ops = policy.ops
        self.gate_up = policy.linear(gate_up)
        self.down = policy.linear(weights.take(f"{prefix}.down_proj.weight", hidden, inner))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: both sub-layers read a normalised copy of the residual stream and add to it."""

    input_norm: torch.Tensor
    attention: Attention
    post_norm: torch.Tensor
    mlp: GatedMLP


class Decoder:
    """Token ids in, hidden states out. Families override the attention's geometry, biases and norms."""

    qk_norm = False

    def __init__(self, config: Mapping[str, Any], weights: Weights, policy: KernelPolicy, max_positions: int) -> None:
        self.config = c = DecoderConfig.read(config)
        self.policy, self.ops = policy, policy.ops
        self.source = config
        self.qkv_bias, self.output_bias = self.biases(config)
        rope_freqs = "rope_freqs.weight"
        factors = None
        if rope_freqs in weights:
            factors = weights.take(rope_freqs, c.head_dim // 2, dtype=torch.float32).cpu()
        self.rope = rope_table(config, c.head_dim, max_positions, factors).to(weights.device)
        self.prefix = weights.strip_prefix("model.")
        self.embedding = weights.take(f"{self.prefix}embed_tokens.weight", c.vocab_size, c.hidden_size)
        self.layers = [self.layer(weights, i) for i in range(c.num_layers)]
        self.norm = weights.take(f"{self.prefix}norm.weight", c.hidden_size)
        if c.tied:
            weights.drop("lm_head.weight")
            self.head = policy.linear(self.embedding)
        else:
            self.head = policy.linear(weights.take("lm_head.weight", c.vocab_size, c.hidden_size))
        self.shape = self.attention_shape(0)

    @staticmethod
    def biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether the product for q, k, v and the output product have biases."""
        return False, False

    def attention_shape(self, layer: int) -> AttentionShape:
        """The geometry of a layer's attention."""
        c = self.config
        return AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim**-0.5)

    def attention(self, weights: Weights, layer: int) -> Attention:
        c, shape = self.config, self.attention_shape(layer)
        prefix = f"{self.prefix}layers.{layer}.self_attn"
        names = [f"{prefix}.{name}_proj" for name in "qkv"]
        weight = weights.take_rows([f"{n}.weight" for n in names], shape.qkv_rows, c.hidden_size)
        bias = weights.take_rows([f"{n}.bias" for n in names], shape.qkv_rows) if self.qkv_bias else None
        output_bias = weights.take(f"{prefix}.o_proj.bias", c.hidden_size) if self.output_bias else None
        output = weights.take(f"{prefix}.o_proj.weight", c.hidden_size, shape.qkv_rows[0])
        norms = [weights.take(f"{prefix}.{n}_norm.weight", c.head_dim) if self.qk_norm else None for n in "qk"]
        return Attention(
            self.policy, shape, self.policy.linear(weight, bias), self.policy.linear(output, output_bias),
            self.rope, norms[0], norms[1], c.eps,
        )  # fmt: skip

    def layer(self, weights: Weights, index: int) -> DecoderLayer:
        c, prefix = self.config, f"{self.prefix}layers.{index}"
        return DecoderLayer(
            input_norm=weights.take(f"{prefix}.input_layernorm.weight", c.hidden_size),
            attention=self.attention(weights, index),
            post_norm=weights.take(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
            mlp=GatedMLP(self.policy, weights, f"{prefix}.mlp", c.hidden_size, c.intermediate_size),
        )

    def forward(self, kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        """The batch's T token ids -> hidden states [T, H] after the last norm; keys and values go to `kv`."""
        eps, norm = self.config.eps, self.ops.rms_norm
        residual = self.embedding[batch.ids]
        update = None
        for index, layer in enumerate(self.layers):
            x = (
                norm(residual, layer.input_norm, eps)
                if update is None
                else norm(update, layer.input_norm, eps, residual)
            )
            attended = layer.attention(x, index, kv, batch)
            update = layer.mlp(norm(attended, layer.post_norm, eps, residual))
        if update is None:
            return norm(residual, self.norm, eps)
        return norm(update, self.norm, eps, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> [R, vocab] in the arithmetic type."""
        return self.head(hidden)
