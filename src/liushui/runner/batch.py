"""`StepPlan` -> the packed tensors of one step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from liushui.core.plan import StepPlan
from liushui.layers.batch import BatchTensors


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The batch, and where each item's rows lie in it."""

    tensors: BatchTensors
    query_start: np.ndarray
    """[S + 1] int32: item i has rows query_start[i] .. query_start[i + 1] - 1."""


def pack(plan: StepPlan, block_size: int, last_tokens: Mapping[str, int]) -> PackedStep:
    """Lay the plan's tokens back to back: T rows, no padding.

    `last_tokens` holds the newest sampled id of each sequence: it stands in where the plan was made before that id
    was known.
    """
    items = plan.items
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
        ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots.astype(np.int32)),
        query_start=torch.from_numpy(query_start),
        seq_lens=torch.from_numpy(starts + counts),
        block_table=torch.from_numpy(table),
    )
    return PackedStep(tensors, query_start)
