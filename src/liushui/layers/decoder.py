"""The rotary decoder with RMSNorm and gated MLPs that most families share, built part by part.

Each part has its method; a family overrides those that differ. As they stand here they make Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from liushui.errors import ModelError
from liushui.kernels.policy import KernelPolicy, Linear
from liushui.kernels.quantised import Quantised
from liushui.layers.attention import Attention, AttentionShape
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.blocks import Activation, DecoderLayer, GatedMLP, RMSNorm
from liushui.layers.rotary import rope_table
from liushui.layers.weights import Weights

if TYPE_CHECKING:
    import torch


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
    def read(cls, config: Mapping[str, Any]) -> DecoderConfig:
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
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


class Decoder:
    """Token ids in, hidden states out."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Keys that the family's config.json files may leave out."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, policy: KernelPolicy, max_positions: int) -> None:
        self.source = {**self.defaults, **config}
        self.config = c = DecoderConfig.read(self.source)
        self.policy, self.ops = policy, policy.ops
        self.activation = self.pick_activation()
        self.ropes = self.rope_tables(weights, max_positions)
        self.prefix = weights.strip_prefix("model.")
        table = weights.take_linear([f"{self.prefix}embed_tokens.weight"], [c.vocab_size], c.hidden_size)
        self.layers = [self.layer(weights, i, f"{self.prefix}layers.{i}") for i in range(c.num_layers)]
        self.norm = self.take_norm(weights, f"{self.prefix}norm", c.hidden_size)
        if c.tied:
            weights.drop("lm_head.weight")
            self.head = policy.linear(table)
        else:
            self.head = policy.linear(weights.take_linear(["lm_head.weight"], [c.vocab_size], c.hidden_size))
        self.embedding = policy.table(table, weights.dtype, self.head if c.tied else None)
        self.shape = self.attention_shape(0)

    def pick_activation(self) -> Activation:
        """The MLP's. Raises `ModelError` for one that the family does not have."""
        name = self.source.get("hidden_act", "silu")
        if name not in ("silu", "swish"):
            raise ModelError(f"config: hidden_act {name!r} is not supported by this family (silu)")
        return self.ops.silu_mul

    def biases(self) -> tuple[bool, bool]:
        """Whether the product for q, k, v and the output product have biases."""
        return False, False

    def rope_tables(self, weights: Weights, max_positions: int) -> Sequence[torch.Tensor]:
        """Each layer's table [max_positions, rotary dimension]."""
        c, factors = self.config, None
        if (name := "rope_freqs.weight") in weights:
            factors = weights.take_floats(name, c.head_dim // 2)
        return [weights.place(rope_table(self.source, c.head_dim, max_positions, factors))] * c.num_layers

    def take_norm(self, weights: Weights, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.ops, weights.take(f"{name}.weight", size), self.config.eps)

    def attention_shape(self, layer: int) -> AttentionShape:
        """The geometry of a layer's attention."""
        c = self.config
        return AttentionShape(c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim**-0.5)

    def qkv_weight(self, weights: Weights, prefix: str, shape: AttentionShape) -> torch.Tensor | Quantised:
        """[(Hq + 2 Hk) D, H]: the projections of query, key and value, one below the other."""
        names = [f"{prefix}.{n}_proj.weight" for n in "qkv"]
        return weights.take_linear(names, shape.qkv_rows, self.config.hidden_size)

    def qkv(self, weights: Weights, prefix: str, shape: AttentionShape) -> Linear:
        """x [T, H] -> [T, (Hq + 2 Hk) D]."""
        weight, bias = self.qkv_weight(weights, prefix, shape), None
        if self.biases()[0]:
            bias = weights.take_rows([f"{prefix}.{n}_proj.bias" for n in "qkv"], shape.qkv_rows)
        return self.policy.linear(weight, bias)

    def head_norms(self, weights: Weights, prefix: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Factors [D] with which each head of q and of k is RMS-normed before the rotation."""
        return None, None

    def attention(self, weights: Weights, layer: int, prefix: str) -> Attention:
        shape, hidden = self.attention_shape(layer), self.config.hidden_size
        qkv = self.qkv(weights, prefix, shape)
        bias = weights.take(f"{prefix}.o_proj.bias", hidden) if self.biases()[1] else None
        output = self.policy.linear(weights.take_linear([f"{prefix}.o_proj.weight"], [hidden], shape.qkv_rows[0]), bias)
        norms = self.head_norms(weights, prefix)
        return Attention(self.policy, shape, qkv, output, self.ropes[layer], *norms, self.config.eps)

    def gate_up_weight(self, weights: Weights, prefix: str, inner: int) -> torch.Tensor | Quantised:
        """[2 I, H]: the projections of gate and value, one below the other."""
        names = [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]
        return weights.take_linear(names, [inner, inner], self.config.hidden_size)

    def gated(self, weights: Weights, prefix: str, inner: int) -> GatedMLP:
        """A gated MLP of width `inner`."""
        gate_up = self.policy.linear(self.gate_up_weight(weights, prefix, inner))
        down = weights.take_linear([f"{prefix}.down_proj.weight"], [self.config.hidden_size], inner)
        return GatedMLP(gate_up, self.activation, self.policy.linear(down))

    def mlp(self, weights: Weights, layer: int, prefix: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """A layer's second half: [T, H] -> [T, H]."""
        return self.gated(weights, f"{prefix}.mlp", self.config.intermediate_size)

    def layer(self, weights: Weights, layer: int, prefix: str) -> DecoderLayer:
        hidden = self.config.hidden_size
        return DecoderLayer(
            attention_input=self.take_norm(weights, f"{prefix}.input_layernorm", hidden),
            attention=self.attention(weights, layer, f"{prefix}.self_attn"),
            mlp_input=self.take_norm(weights, f"{prefix}.post_attention_layernorm", hidden),
            mlp=self.mlp(weights, layer, prefix),
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H], a tensor of its own."""
        return self.embedding(ids)

    def forward(self, kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        """The batch's T token ids -> hidden states [T, H] after the last norm; keys and values go to `kv`."""
        residual = self.embed(batch.ids)
        update = None
        for index, layer in enumerate(self.layers):
            attended = layer.attention(layer.attention_input(update, residual), index, kv, batch)
            update = layer.mlp(layer.mlp_input(attended, residual))
        return self.norm(update, residual)

    @property
    def logits_divisor(self) -> float:
        """What `logits` divides the head's product by."""
        return 1.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> [R, vocab] in the arithmetic type."""
        return self.head(hidden)
