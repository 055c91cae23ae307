"""OLMo 2 (arXiv:2501.00656): each sub-layer's output is normed, not its input; so are whole queries and keys."""

from liushui.kernels.policy import Linear
from liushui.layers.attention import AttentionShape
from liushui.layers.blocks import DecoderLayer, NormedQueryKey, Then, as_it_is
from liushui.layers.weights import Weights
from liushui.models.llama import Llama


class Olmo2(Llama):
    def qkv(self, weights: Weights, prefix: str, shape: AttentionShape) -> Linear:
        query = self.take_norm(weights, f"{prefix}.q_norm", shape.qkv_rows[0])
        key = self.take_norm(weights, f"{prefix}.k_norm", shape.qkv_rows[1])
        return NormedQueryKey(super().qkv(weights, prefix, shape), shape.qkv_rows, query, key)

    def layer(self, weights: Weights, layer: int, prefix: str) -> DecoderLayer:
        attention = self.attention(weights, layer, f"{prefix}.self_attn")
        after_attention, after_mlp = (
            self.take_norm(weights, f"{prefix}.post_{part}_layernorm", self.config.hidden_size).alone
            for part in ("attention", "feedforward")
        )
        mlp = self.mlp(weights, layer, prefix)
        return DecoderLayer(as_it_is, Then(attention, after_attention), as_it_is, Then(mlp, after_mlp))
