"""The padded way to run a batch, on the same weights: to explain, and to check the packed way.

    column          0    1    2    3    4       a rectangle [B, T]: short rows are filled up on the left,
    input_ids      pad  pad  The  sky  is       so that every row's last token is in the last column
    attention_mask  0    0    1    1    1       which columns may be attended to
    position_ids    0    0    0    1    2       cumsum(mask) - 1, padding filled: index in the row's own text

A padded cache is a paged one with a single block per row, as long as the longest row. So the model's own forward runs
here; only its attention is replaced, by a dense, masked one in plain torch. Serving never comes through here: the
engine packs the rows instead, and has no padding to hide.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from liushui.errors import CapacityError, ModelError
from liushui.layers.attention import Attention
from liushui.layers.batch import BatchTensors, KVCache


class PaddedKV:
    """Keys and values of a rectangle: [layers, B, kv_heads, columns, head_dim], filled from the left."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.columns = 0
        """Filled so far."""


class PaddedModel:
    """`forward` with the arguments of Hugging Face's models. On the processor."""

    def __init__(self, model: Any) -> None:
        """`model`: of `models.registry`. Raises `ModelError` for one whose attention is not the shared one."""
        self.model = model
        self.attentions = [_attention(layer) for layer in model.layers]

    def new_kv(self, rows: int, columns: int) -> PaddedKV:
        """Room for `rows` sequences of up to `columns` tokens, padding included."""
        shape = self.attentions[0].shape
        weight = self.model.norm.weight
        layers = len(self.attentions)
        return PaddedKV(KVCache.allocate(layers, rows, shape.num_kv_heads, columns, shape.head_dim, weight.dtype))

    @torch.inference_mode()
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, kv: PaddedKV
    ) -> torch.Tensor:
        """input_ids, position_ids [B, T] int64, attention_mask [B, columns in `kv` + T] -> hidden states [B, T, H].

        Adds T columns to `kv`. Without a cache, give a new one each time. Raises `CapacityError` if it is full.
        """
        (rows, new), room = input_ids.shape, kv.cache.keys.shape[3]
        if kv.columns + new > room:
            raise CapacityError("columns", f"{kv.columns} + {new} do not fit into a padded cache of {room}")
        row = torch.arange(rows, dtype=torch.int32)[:, None]
        columns = torch.arange(kv.columns, kv.columns + new, dtype=torch.int32)
        kv.columns += new
        batch = BatchTensors(
            ids=input_ids.flatten(),
            positions=position_ids.flatten().int(),
            slots=(row * room + columns).flatten(),
            query_start=torch.arange(0, rows * new + 1, new, dtype=torch.int32),
            seq_lens=torch.full((rows,), kv.columns, dtype=torch.int32),
            block_table=row.contiguous(),
        )
        with self._masked(attention_mask.bool()):
            hidden: torch.Tensor = self.model.forward(kv.cache, batch)
        return hidden.view(rows, new, -1)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, H] -> [B, vocab] float32."""
        logits: torch.Tensor = self.model.logits(hidden.contiguous())
        return logits.float()

    @contextmanager
    def _masked(self, mask: torch.Tensor) -> Iterator[None]:
        usual = [attention.ops for attention in self.attentions]
        for attention in self.attentions:
            attention.ops = MaskedOps(attention.ops, mask)
        try:
            yield
        finally:
            for attention, ops in zip(self.attentions, usual, strict=True):
                attention.ops = ops


class MaskedOps:
    """The operations of a layer, with attention over a rectangle that has holes."""

    def __init__(self, ops: Any, mask: torch.Tensor) -> None:
        """`mask` [B, L]: False is padding."""
        self._ops, self._mask = ops, mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attention(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """q in qkv [B T, (Hq + 2 Hk) D] over the caches [B, Hk, C, D], of which L columns are filled -> [B T, Hq D]."""
        rows, filled = self._mask.shape
        new = qkv.shape[0] // rows
        query = qkv[:, : num_heads * head_dim].reshape(rows, new, num_kv_heads, -1, head_dim)
        keys, values = k_cache[:, :, :filled], v_cache[:, :, :filled]
        scores = torch.einsum("btkgd,bkld->bkgtl", query.float(), keys.float()) * scale
        # Not -inf: the rows of padding see nothing at all, and must not become NaN.
        lowest = torch.finfo(torch.float32).min
        weights = scores.masked_fill(~self.visible(new, window)[:, None, None], lowest).softmax(dim=-1)
        mixed = torch.einsum("bkgtl,bkld->btkgd", weights, values.float())
        return mixed.reshape(rows * new, num_heads * head_dim).to(qkv.dtype).contiguous()

    def visible(self, new: int, window: int | None) -> torch.Tensor:
        """[B, T, L] bool: no padding, nothing from the future, nothing beyond the window."""
        filled = self._mask.shape[1]
        key = torch.arange(filled)
        query = torch.arange(filled - new, filled)[:, None]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        return seen & self._mask[:, None, :]


def pad(prompts: Sequence[Sequence[int]], token: int, *, right: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as a rectangle, filled with `token` on the left: (input_ids, attention_mask), each [B, longest] int64."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), token), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = 0 if right else width - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def prompt_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """attention_mask [B, T] -> position_ids [B, T]: each token's index in its own row; padding is filled with 0."""
    return (attention_mask.cumsum(dim=-1) - 1).masked_fill(attention_mask == 0, 0)


def next_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, 1]: the last one + 1."""
    return position_ids[:, -1:] + 1


def _attention(layer: Any) -> Attention:
    """The attention of a layer, out of what a family wraps around it."""
    part = getattr(layer, "attention", None)
    while not isinstance(part, Attention):
        if (part := getattr(part, "first", None)) is None:
            raise ModelError("the padded way does not know this family's attention")
    return part
