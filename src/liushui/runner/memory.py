"""How much memory the KV cache gets, and what that means in tokens and requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liushui.config import EngineConfig
from liushui.errors import CapacityError, ParameterError
from liushui.kernels.arrays import type_like, type_name
from liushui.models.registry import ModelSizes

GIB = 2**30
DEFAULT_CAP = 4 * GIB
"""Without --kv-cache-gib nobody's laptop is filled with cached prefixes."""
CACHE_TOKENS = 16384
"""Nor with more of them than this while others can make way; or two requests of full length, if that is more."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """The KV cache's size and the context length it allows."""

    num_blocks: int
    block_size: int
    bytes_per_token: int
    max_model_len: int
    notes: tuple[str, ...]
    cache_room: int
    """Blocks that cached content may spread over before it makes way: `BlockPool`. All, where memory was asked for in
    so many words, or is claimed at the start, as on a GPU."""

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


GPU_BLOCK_SIZE = 64
BLOCK_SIZE = 16
"""Tokens in a block, unless the settings or the device say otherwise."""


def pick_kv_dtype(config: EngineConfig, dtype: Any, ops_name: str) -> Any:
    """`EngineConfig.kv_cache_dtype` -> the type of the cache. Raises `ParameterError` for one that cannot be had."""
    arithmetic = type_name(dtype)
    if config.kv_cache_dtype in ("auto", arithmetic):
        return dtype
    if config.kv_cache_dtype != "int8":
        raise ParameterError(
            "kv_cache_dtype",
            f"{config.kv_cache_dtype} beside {arithmetic} arithmetic is not supported; choose auto or int8, or dtype "
            f"{config.kv_cache_dtype}",
        )
    if ops_name != "native":
        raise ParameterError(
            "kv_cache_dtype", f"int8 needs the native CPU kernels, not {ops_name} kernels; choose auto"
        )
    return type_like(dtype, "int8")


def plan_kv(config: EngineConfig, sizes: ModelSizes, dtype: Any, free_bytes: int, *, on_gpu: bool = False) -> KVPlan:
    """Size the cache. Raises `CapacityError` naming the setting that asks for the impossible.

    `free_bytes`: what may be taken. A GPU is there to be filled, so it is; of a processor's memory only a part.
    """
    block_size = config.block_size or (GPU_BLOCK_SIZE if on_gpu else BLOCK_SIZE)
    limit = config.max_model_len or sizes.max_positions
    if limit > sizes.max_positions:
        raise CapacityError(
            "max_model_len", f"{limit:,} is beyond the model's {sizes.max_positions:,} positions; ask for at most that"
        )
    per_token = sizes.kv_bytes_per_token(dtype)
    per_block = per_token * block_size
    if config.kv_cache_gib is not None:
        budget = int(config.kv_cache_gib * GIB)
        if budget > free_bytes:
            raise CapacityError(
                "kv_cache_gib",
                f"{config.kv_cache_gib:g} GiB asked, {free_bytes / GIB:.1f} GiB free after the weights; "
                f"give at most {int(free_bytes / GIB * 9) / 10:g}",
            )
    else:
        useful = -(-limit // block_size) * per_block * config.seats
        budget = min(useful, free_bytes) if on_gpu else min(useful, free_bytes // 2, DEFAULT_CAP)
    blocks = budget // per_block
    if blocks < 1:
        raise CapacityError(
            "kv_cache_gib",
            f"{budget / GIB:.3f} GiB hold no block of {block_size} tokens ({per_block:,} bytes); give at least "
            f"{per_block / GIB:.4f}",
        )
    notes = []
    if limit > blocks * block_size:
        fits = blocks * block_size
        if config.max_model_len is not None:
            raise CapacityError(
                "max_model_len",
                f"{limit:,} tokens need {limit * per_token / GIB:.2f} GiB of KV cache, there is "
                f"{budget / GIB:.2f}: lower it to {fits:,} or raise kv_cache_gib",
            )
        notes.append(f"context limited to {fits:,} tokens by the KV cache (the model allows {limit:,})")
        limit = fits
    tokens = blocks * block_size
    typical = min(2048, limit)
    size = (
        f"{tokens * per_token / GIB:.2f} GiB"
        if tokens * per_token >= GIB / 100
        else f"{tokens * per_token / 2**20:.1f} MiB"
    )
    line = f"KV cache: {size} = {tokens:,} tokens = {tokens // typical:,} requests of {typical:,}"
    room = blocks if on_gpu or config.kv_cache_gib is not None else max(CACHE_TOKENS, 2 * limit) // block_size
    return KVPlan(blocks, block_size, per_token, limit, (line, *notes), min(room, blocks))
