"""`StepPlan` -> the packed tensors of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liushui.core.plan import PlanItem, StepPlan
from liushui.layers.batch import BatchTensors

Wrap = Callable[[np.ndarray], Any]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The batch, and where each item's rows lie in it."""

    tensors: BatchTensors
    query_start: np.ndarray
    """[S + 1] int32: item i has rows query_start[i] .. query_start[i + 1] - 1."""


def pack(plan: StepPlan, block_size: int, last_tokens: Mapping[str, int], wrap: Wrap | None = None) -> PackedStep:
    """Lay the plan's tokens back to back: T rows, no padding.

    `last_tokens` holds the newest sampled id of each sequence: it stands in where the plan was made before that id
    was known. `wrap`: what makes the step's tensors of numpy's arrays (default: torch's view of them).
    """
    if wrap is None:
        import torch

        wrap = torch.from_numpy
    items = plan.items
    if all(item.num_tokens == 1 for item in items):
        return _pack_single(items, block_size, last_tokens, wrap)
    counts = np.fromiter((item.num_tokens for item in items), np.int32, len(items))
    starts = np.fromiter((item.start for item in items), np.int32, len(items))
    query_start = np.zeros(len(items) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    ids: list[int] = []
    for item in items:
        ids.extend(item.token_ids)
        if len(item.token_ids) < item.num_tokens:
            ids.append(last_tokens[item.seq_id])
    # Position of a row = start of its item + index of the row within the item.
    positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    width = max(len(item.block_table) for item in items)
    table = np.zeros((len(items), width), np.int32)
    for row, item in enumerate(items):
        table[row, : len(item.block_table)] = item.block_table
    owner = np.repeat(np.arange(len(items)), counts)
    slots = table[owner, positions // block_size] * block_size + positions % block_size
    tensors = BatchTensors(
        ids=wrap(np.array(ids, np.int64)),
        positions=wrap(positions),
        slots=wrap(slots.astype(np.int32)),
        query_start=wrap(query_start),
        seq_lens=wrap(starts + counts),
        block_table=wrap(table),
    )
    return PackedStep(tensors, query_start)


def _pack_single(items: Sequence[PlanItem], block_size: int, last_tokens: Mapping[str, int], wrap: Wrap) -> PackedStep:
    """The same for a step in which every sequence has one token, as most have: row i is item i."""
    count = len(items)
    ids = [item.token_ids[0] if item.token_ids else last_tokens[item.seq_id] for item in items]
    starts = [item.start for item in items]
    slots = [
        item.block_table[start // block_size] * block_size + start % block_size
        for item, start in zip(items, starts, strict=True)
    ]
    flat = np.array([*starts, *slots, *(start + 1 for start in starts)], np.int32)
    query_start = np.arange(count + 1, dtype=np.int32)
    table = np.zeros((count, max(len(item.block_table) for item in items)), np.int32)
    for row, item in zip(table, items, strict=True):
        row[: len(item.block_table)] = item.block_table
    tensors = BatchTensors(
        ids=wrap(np.array(ids, np.int64)),
        positions=wrap(flat[:count]),
        slots=wrap(flat[count : 2 * count]),
        query_start=wrap(query_start),
        seq_lens=wrap(flat[2 * count :]),
        block_table=wrap(table),
    )
    return PackedStep(tensors, query_start)
