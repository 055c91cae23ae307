"""One step of the batch as tensors: ragged rows back to back, no padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liushui.kernels.arrays import Array, type_like, type_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """T rows (tokens) of S sequences. Row r belongs to sequence s if query_start[s] <= r < query_start[s + 1]."""

    ids: torch.Tensor
    """[T] int64 (int32 on a GPU): token ids."""
    positions: torch.Tensor
    """[T] int32: index of the row's token in its own sequence."""
    slots: torch.Tensor
    """[T] int32: where the row's key and value go: block * block_size + offset."""
    query_start: torch.Tensor
    """[S + 1] int32."""
    seq_lens: torch.Tensor
    """[S] int32: tokens of the sequence including this step's."""
    block_table: torch.Tensor
    """[S, max_blocks] int32, 0 beyond a sequence's blocks."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class KVCache:
    """Paged keys and values of all layers, each [num_layers, num_blocks, kv_heads, block_size, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of int8 keys and of values, each [num_layers, num_blocks, kv_heads, block_size] float32."""

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys, values and scales of a layer."""
        scales = None if self.scales is None else (self.scales[0][index], self.scales[1][index])
        return self.keys[index], self.values[index], scales

    @classmethod
    def allocate(
        cls,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: Any,
        device: torch.device | None = None,
    ) -> KVCache:
        """`dtype`: torch's, or its name: then the memory is numpy's (`kernels.arrays`)."""
        shape = (layers, blocks, kv_heads, block_size, head_dim)
        # Empty, not zeros: pages that are never used are never resident.
        keys, values = (_empty(shape, dtype, device) for _ in range(2))
        if type_name(dtype) != "int8":
            return cls(keys, values)
        scale = type_like(dtype, "float32")
        return cls(keys, values, (_empty(shape[:-1], scale, device), _empty(shape[:-1], scale, device)))


def _empty(shape: tuple[int, ...], dtype: Any, device: torch.device | None) -> Any:
    if isinstance(dtype, str):
        return Array.empty(shape, dtype)
    import torch

    return torch.empty(shape, dtype=dtype, device=device)
