"""A decoder of plain layers taken apart, so that one native call can run all of a step."""

from collections.abc import Callable
from typing import Any

from liushui.kernels.arrays import type_name
from liushui.kernels.native_step import DecoderParts, LayerParts
from liushui.kernels.policy import OpsLinear, PackedTable
from liushui.layers.attention import Attention
from liushui.layers.blocks import DecoderLayer, GatedMLP, RMSNorm, Scale, Then
from liushui.layers.decoder import Decoder

Address = Callable[[OpsLinear], int | None]
"""Where a product's packed weight lies; None if it is not the library's."""


def take_apart(model: Any, address: Address) -> DecoderParts | None:
    """The parts of a decoder whose layers are plain, or None. The parts' memory belongs to the model."""
    if not isinstance(model, Decoder) or type(model).forward is not Decoder.forward:
        return None
    found = [_layer(layer, address) for layer in model.layers]
    layers = [part for part, _ in found if part is not None]
    scales = {scale for _, scale in found}
    head = _address(model.head, address)
    plain_norm = isinstance(model.norm, RMSNorm) and not model.norm.unit_offset
    if len(layers) < len(found) or not layers or len(scales) > 1 or head is None or not plain_norm:
        return None
    c = model.config
    return DecoderParts(
        type_name(model.norm.weight.dtype), c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim,
        layers, model.norm.weight, model.norm.eps, head, scales.pop(), model.logits_divisor,
    )  # fmt: skip


def embedding_of(model: Any) -> PackedTable | None:
    """The table whose rows are all that a decoder makes of token ids, if it is a packed one."""
    plain = isinstance(model, Decoder) and type(model).embed is Decoder.embed
    return model.embedding if plain and isinstance(model.embedding, PackedTable) else None


def _layer(layer: DecoderLayer, address: Address) -> tuple[LayerParts | None, float]:
    """The layer's parts, if they are plain ones, and the factor of what it adds to the stream."""
    attention, attention_scale = _unscaled(layer.attention)
    mlp, mlp_scale = _unscaled(layer.mlp)
    before: Any = layer.attention_input
    between: Any = layer.mlp_input
    norms = all(isinstance(norm, RMSNorm) and not norm.unit_offset for norm in (before, between))
    if not (norms and isinstance(attention, Attention) and isinstance(mlp, GatedMLP) and attention_scale == mlp_scale):
        return None, 1.0
    products = [_address(p, address) for p in (attention.qkv, attention.output, mlp.gate_up, mlp.down)]
    known = [place for place in products if place is not None]
    if len(known) < len(products) or attention.rope is None:
        return None, 1.0
    if mlp.activation != attention.ops.silu_mul:
        return None, 1.0
    shape = attention.shape
    part = LayerParts(
        known[0], known[1], known[2], known[3], before.weight, before.eps, between.weight, between.eps,
        attention.q_norm, attention.k_norm, attention.eps, attention.rope, shape.scale, shape.window,
    )  # fmt: skip
    return part, attention_scale


def _unscaled(block: Any) -> tuple[Any, float]:
    if isinstance(block, Then) and isinstance(block.second, Scale):
        return block.first, block.second.factor
    return block, 1.0


def _address(product: Any, address: Address) -> int | None:
    return address(product) if isinstance(product, OpsLinear) and product.bias is None else None
