"""Decoder layers in fewer kernels, for steps of few rows: norms, activation and residual sums within the products.

Only layers put together from the plain parts are fused; the bits are those of the parts one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from liushui.kernels.ops import PackedLinear
from liushui.kernels.policy import OpsLinear
from liushui.layers.attention import Attention
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.blocks import DecoderLayer, GatedMLP, RMSNorm
from liushui.layers.decoder import Decoder

Forward = Callable[[KVCache, BatchTensors], torch.Tensor]
Whole = Callable[[torch.Tensor, BatchTensors], bool]
"""The residual stream [T, H] through all layers in place; False where nothing was done."""


class FusedOps(Protocol):
    """Operations in one that an implementation may offer besides `Ops`."""

    def fuses(self, rows: int, hidden: int) -> bool:
        """Whether they are the faster way for a step of `rows` rows of `hidden` values."""
        ...

    def norm_linear(
        self, x: torch.Tensor, norm: torch.Tensor, eps: float, packed: PackedLinear, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`linear(rms_norm(x))`."""
        ...

    def norm_gated(self, x: torch.Tensor, norm: torch.Tensor, eps: float, packed: PackedLinear) -> torch.Tensor:
        """`silu_mul(linear(rms_norm(x)))`."""
        ...

    def linear_add(
        self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """residual += `linear(x)`, in place."""
        ...


def forward_of(model: Any, ops: Any, whole: Whole | None = None) -> Forward:
    """The model's forward, through `FusedOps` where it is a decoder of plain layers and a step has few rows.

    `whole` is asked first then.
    """
    by_parts: Forward = model.forward
    if not (isinstance(model, Decoder) and hasattr(ops, "fuses") and all(map(plain, model.layers))):
        return by_parts

    def forward(kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        if not ops.fuses(len(batch.ids), model.config.hidden_size):
            return by_parts(kv, batch)
        x = model.embed(batch.ids)
        if whole is None or not whole(x, batch):
            stream(x, model.layers, ops, kv, batch)
        return model.norm(None, x)

    return forward


def stream(
    x: torch.Tensor, layers: Sequence[DecoderLayer], ops: FusedOps, kv: KVCache, batch: BatchTensors
) -> torch.Tensor:
    """The residual stream x [T, H] after all layers, in place."""
    for index, layer in enumerate(layers):
        attention: Any = layer.attention
        mlp: Any = layer.mlp
        before: Any = layer.attention_input
        between: Any = layer.mlp_input
        qkv = ops.norm_linear(x, before.weight, before.eps, attention.qkv.packed, attention.qkv.bias)
        mixed = attention.mix(qkv, index, kv, batch)
        ops.linear_add(mixed, attention.output.packed, attention.output.bias, x)
        inner = ops.norm_gated(x, between.weight, between.eps, mlp.gate_up.packed)
        ops.linear_add(inner, mlp.down.packed, mlp.down.bias, x)
    return x


def plain(layer: DecoderLayer) -> bool:
    """Whether the layer is put together from the parts that `stream` knows."""
    norms = (layer.attention_input, layer.mlp_input)
    return (
        all(isinstance(norm, RMSNorm) and not norm.unit_offset for norm in norms)
        and isinstance(layer.attention, Attention)
        and isinstance(layer.attention.qkv, OpsLinear)
        and isinstance(layer.attention.output, OpsLinear)
        and isinstance(layer.mlp, GatedMLP)
        and isinstance(layer.mlp.gate_up, OpsLinear)
        and layer.mlp.gate_up.bias is None
        and isinstance(layer.mlp.down, OpsLinear)
        and layer.mlp.activation == layer.mlp.gate_up.ops.silu_mul
    )
