"""`StepPlan` -> one pinned int32 buffer -> one copy to the device -> the tensors of a step.

The buffer's layout depends on `StepShape` alone, and the device buffer stays where it is: a captured CUDA graph reads
each step from the same addresses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from liushui.core.plan import StepPlan
from liushui.layers.batch import BatchTensors
from liushui.runner.noise import row_keys
from liushui.runner.state import SequenceState

_ALIGN = 16
"""int32 words: parts begin at multiples of 64 bytes, so that a kernel's loads are as wide in every part."""
_ALL_TOKENS = 2**24
"""A top_k this large is all tokens; float32 holds every integer up to it."""
RING = 4
"""Pinned buffers: more than the steps that can be in flight."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Padded sizes of a step: all that its launches depend on (the key of a captured graph)."""

    rows: int
    """Token rows, T."""
    sequences: int
    """Sequences, S; also the rows that are sampled."""
    width: int
    """Blocks in a row of the block table."""
    limited: bool
    """Whether a row asks for top_k, top_p or min_p."""

    def parts(self) -> list[tuple[str, int]]:
        s = self.sequences
        return [
            ("ids", self.rows), ("positions", self.rows), ("slots", self.rows), ("query_start", s + 1),
            ("seq_lens", s), ("block_table", s * self.width), ("sampled", s), ("places", s), ("keys", 2 * s),
            ("temperatures", s), ("top_ks", s), ("top_ps", s), ("min_ps", s),
        ]  # fmt: skip

    def offsets(self) -> dict[str, slice]:
        found, at = {}, 0
        for name, size in self.parts():
            found[name] = slice(at, at + size)
            at += -(-size // _ALIGN) * _ALIGN
        found["all"] = slice(0, at)
        return found


@dataclass(frozen=True, slots=True)
class SampleTensors:
    """The rows that predict a token, and how each is to be chosen; padding rows are greedy and go to the last place."""

    rows: torch.Tensor
    """[S] int32: row of the step."""
    places: torch.Tensor
    """[S] int32: where the token is kept for the next step: the sequence's slot in the batch."""
    keys: torch.Tensor
    """[S, 2] int32: words of the noise (`noise.row_key`)."""
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor


class Staging:
    """Host and device copies of the step, and what is remembered of each place in the batch."""

    def __init__(self, device: torch.device, max_num_seqs: int, max_rows: int, max_width: int, block_size: int) -> None:
        largest = StepShape(max_rows, max_num_seqs, max_width, False)
        words = largest.offsets()["all"].stop
        self.block_size, self.max_num_seqs = block_size, max_num_seqs
        pinned = device.type == "cuda"
        self._host = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._turn = 0
        places = max_num_seqs + 1
        self._tables = np.zeros((places, max_width), np.int32)
        self._blocks: list[tuple[int, ...]] = [()] * places
        self._owners: list[str | None] = [None] * places
        self._seeds = np.zeros(places, np.uint64)
        self._params = np.zeros((4, places), np.float32)  # temperature, top_k, top_p, min_p
        self._params[2] = 1.0

    def tensors(self, shape: StepShape) -> tuple[BatchTensors, SampleTensors]:
        """Views of the device buffer: the batch, where -1 - place stands for a token in flight, and the sampling."""
        at = shape.offsets()
        part = {name: self._device[where] for name, where in at.items()}
        batch = BatchTensors(
            ids=part["ids"], positions=part["positions"], slots=part["slots"], query_start=part["query_start"],
            seq_lens=part["seq_lens"], block_table=part["block_table"].view(shape.sequences, shape.width),
        )  # fmt: skip
        sample = SampleTensors(
            rows=part["sampled"], places=part["places"], keys=part["keys"].view(-1, 2),
            temperatures=part["temperatures"].view(torch.float32), top_ks=part["top_ks"],
            top_ps=part["top_ps"].view(torch.float32), min_ps=part["min_ps"].view(torch.float32),
        )  # fmt: skip
        return batch, sample

    def width(self, plan: StepPlan) -> int:
        return max(len(item.block_table) for item in plan.items)

    def limited(self, plan: StepPlan, states: Mapping[str, SequenceState]) -> bool:
        return any(item.samples and states[item.seq_id].truncates for item in plan.items)

    def fill(self, plan: StepPlan, shape: StepShape, states: Mapping[str, SequenceState]) -> None:
        """Write the plan into the next pinned buffer and start its copy to the device."""
        buffer = self._host[self._turn]
        self._turn = (self._turn + 1) % RING
        at = shape.offsets()
        host = buffer.numpy()
        part = {name: host[where] for name, where in at.items()}
        places = self._remember(plan, states)
        self._fill_batch(plan, shape, part, places)
        self._fill_sampling(plan, shape, part, places)
        self._device[at["all"]].copy_(buffer[at["all"]], non_blocking=True)

    def _remember(self, plan: StepPlan, states: Mapping[str, SequenceState]) -> np.ndarray:
        """Bring the places' block tables and parameters up to date; returns the items' places."""
        fresh = {new.seq_id for new in plan.new}  # an id may be used again, once its first owner has ended
        for item in plan.items:
            place = item.slot
            if self._owners[place] != item.seq_id or item.seq_id in fresh:
                self._owners[place] = item.seq_id
                new = states[item.seq_id].new
                s = new.sampling
                top_k = min(max(0, s.top_k), _ALL_TOKENS)
                self._seeds[place] = new.seed & 0xFFFFFFFFFFFFFFFF
                self._params[:, place] = (0.0 if s.greedy else s.temperature, top_k, s.top_p, s.min_p)
            if self._blocks[place] != item.block_table:
                self._blocks[place] = item.block_table
                self._tables[place, : len(item.block_table)] = item.block_table
        return np.fromiter((item.slot for item in plan.items), np.int64, len(plan.items))

    def _fill_batch(self, plan: StepPlan, shape: StepShape, part: dict[str, np.ndarray], places: np.ndarray) -> None:
        items, count = plan.items, len(plan.items)
        lengths = np.fromiter((item.num_tokens for item in items), np.int32, count)
        starts = np.fromiter((item.start for item in items), np.int32, count)
        ids: list[int] = []
        for item in items:
            ids.extend(item.token_ids)
            if len(item.token_ids) < item.num_tokens:
                ids.append(-1 - item.slot)  # in flight: the device knows it
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        positions = np.arange(total, dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
        owner = np.repeat(places, lengths)
        blocks = self._tables[owner, positions // self.block_size]
        part["ids"][:total], part["ids"][total:] = ids, 0
        part["positions"][:total], part["positions"][total:] = positions, 0
        part["slots"][:total] = blocks * self.block_size + positions % self.block_size
        part["slots"][total:] = -1
        query_start = part["query_start"]
        query_start[0], query_start[1 : count + 1] = 0, ends
        # Padding sequences have no keys, and one row each while there are any: those come out as zeros.
        query_start[count + 1 :] = np.minimum(np.arange(1, shape.sequences - count + 1) + total, shape.rows)
        part["seq_lens"][:count], part["seq_lens"][count:] = starts + lengths, 0
        table = part["block_table"].reshape(shape.sequences, shape.width)
        table[:count], table[count:] = self._tables[places, : shape.width], 0

    def _fill_sampling(self, plan: StepPlan, shape: StepShape, part: dict[str, np.ndarray], places: np.ndarray) -> None:
        sampling = np.fromiter((item.samples for item in plan.items), bool, len(plan.items))
        count = int(sampling.sum())
        chosen = places[sampling]
        part["sampled"][:count] = part["query_start"][1 : len(plan.items) + 1][sampling] - 1
        part["sampled"][count:] = 0
        part["places"][:count], part["places"][count:] = chosen, self.max_num_seqs
        positions = part["seq_lens"][: len(plan.items)][sampling]  # the token chosen now will stand there
        keys = part["keys"].reshape(-1, 2)
        keys[:count] = row_keys(self._seeds[chosen], positions).view(np.int32)
        params = self._params[:, chosen]
        for row, (name, padding) in enumerate((("temperatures", 0.0), ("top_ks", 0), ("top_ps", 1.0), ("min_ps", 0.0))):
            target = part[name] if name == "top_ks" else part[name].view(np.float32)
            target[:count], target[count:] = params[row], padding
