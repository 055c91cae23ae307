"""Self-attention over the paged KV cache, shared by all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liushui.kernels.policy import KernelPolicy, Linear
from liushui.layers.batch import BatchTensors, KVCache

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The geometry of one model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    """Sliding window: a query sees its own position and the window - 1 before it."""

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv


class Attention:
    """hidden [T, H] -> [T, H]: one product for q, k and v, rotation and cache write, attention, output product."""

    def __init__(
        self,
        policy: KernelPolicy,
        shape: AttentionShape,
        qkv: Linear,
        output: Linear,
        rope: torch.Tensor | None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        self.ops, self.shape, self.qkv, self.output = policy.ops, shape, qkv, output
        self.rope, self.q_norm, self.k_norm, self.eps = rope, q_norm, k_norm, eps

    def __call__(self, x: torch.Tensor, layer: int, kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        return self.output(self.mix(self.qkv(x), layer, kv, batch))

    def mix(self, qkv: torch.Tensor, layer: int, kv: KVCache, batch: BatchTensors) -> torch.Tensor:
        """q, k and v [T, (Hq + 2 Hk) D] -> the heads' mixed values [T, Hq D]; keys and values go to `kv`."""
        s = self.shape
        keys, values, scales = kv.layer(layer)
        more: dict[str, Any] = {} if scales is None else {"scales": scales}  # few implementations can
        self.ops.qkv_to_cache(
            qkv, s.num_heads, s.num_kv_heads, s.head_dim, batch.positions, batch.slots, keys, values,
            self.rope, self.q_norm, self.k_norm, self.eps, **more,
        )  # fmt: skip
        return self.ops.attention(
            qkv, s.num_heads, s.num_kv_heads, s.head_dim, keys, values,
            batch.query_start, batch.seq_lens, batch.block_table, s.scale, s.window, **more,
        )  # fmt: skip
