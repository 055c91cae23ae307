"""Steps on the processor: pack, forward, choose, all done when the call returns.

Where the native library can run all layers in one call, it also chooses the tokens of the rows that just want the
most likely one: their logits are never put into memory. All others get theirs, and go through the sampler, which is
torch's. A model of `Array`s runs only the first way, and torch is not loaded until a row wants more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from liushui.core.plan import PlanItem, StepPlan, StepResult, TokenLogprobs
from liushui.kernels.arrays import Array
from liushui.kernels.native_decode import NativeDecode
from liushui.kernels.native_step import NativeStep
from liushui.kernels.ops import Ops
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.whole import embedding_of, take_apart
from liushui.models.registry import Model
from liushui.runner.batch import Wrap, pack
from liushui.runner.fresh import Fresh
from liushui.runner.sampler import SampleRow, sample, token_logprobs
from liushui.runner.state import SequenceState

if TYPE_CHECKING:
    import torch

NOT_FINITE = "the model gave logits that are not finite (NaN or infinity)"
_LOGIT_ROWS = 64
"""Rows of float32 logits made at once: a long prompt's log-probabilities must not fill the memory."""


def whole_step(model: Model, ops: Ops, kv: KVCache) -> NativeStep | None:
    """All layers in one native call, for decoders of plain parts; None: operation by operation."""
    build = getattr(ops, "step", None)
    if build is None:
        return None
    parts = take_apart(model, lambda product: getattr(product.packed, "address", None))
    step: NativeStep | None = None if parts is None else build(parts, kv.keys, kv.values, kv.scales)
    return step


def decode_step(model: Model, ops: Ops, step: NativeStep | None) -> NativeDecode | None:
    """The same from token ids to token ids, where a plain table turns ids into rows; None: in two calls."""
    table = embedding_of(model)
    if step is None or table is None:
        return None
    decode: NativeDecode | None = ops.decode(step, table.packed, table.dtype)  # type: ignore[attr-defined]
    return decode


class HostSteps:
    """Runs plans here. Keeps the newest token of each sequence, for plans made before it was known."""

    def __init__(self, model: Model, kv: KVCache, block_size: int, whole: NativeStep | None = None) -> None:
        self.built, self.kv, self.block_size, self.whole = model, kv, block_size, whole
        self.decode: NativeDecode | None = None
        self.last_tokens: dict[str, int] = {}
        self.wrap: Wrap | None = Array if isinstance(kv.keys, Array) else None
        self.fresh: Fresh | None = None
        """Makes memory before it is needed; None: steps do."""

    def prepare(self, ops: Ops, rows: int, sequences: int) -> None:
        """Take the whole way, for steps of up to `rows` rows, where the model and the kernels have one."""
        if ask := getattr(ops, "use_huge_pages", None):
            ask(self.kv.keys)
            ask(self.kv.values)
        self.whole = whole_step(self.built, ops, self.kv)
        if self.whole is not None:
            self.whole.reserve(rows, sequences)
        self.decode = decode_step(self.built, ops, self.whole)

    def forget(self, seq_id: str) -> None:
        self.last_tokens.pop(seq_id, None)

    def run(self, plan: StepPlan, states: Mapping[str, SequenceState], model: Model) -> StepResult:
        """One step of `model`: the one that was built, or one that watches it."""
        if self.fresh is not None:
            self.fresh.used(max((item.block_table[-1] for item in plan.items), default=0))
        watched = self.whole is None or model is not self.built
        if self.decode is not None and not watched:
            done = self._decode(self.decode, plan.items, states)
            if done is not None:
                return done
        packed = pack(plan, self.block_size, self.last_tokens, self.wrap)
        ends = packed.query_start.tolist()
        likely, sampling, asked = self._sort(plan, states, ends, watched)
        best: list[int] = []
        if watched or self.whole is None:
            hidden = model.forward(self.kv, packed.tensors)
            places: Mapping[int, int] = dict(zip(range(ends[-1]), range(ends[-1]), strict=True))
        else:
            wanted = [row for _, row in (*likely, *sampling)]
            for item, first in asked:
                wanted += [first + position - item.start for position in self._prompt_rows(item, states)]
            hidden, best = self._whole(self.whole, packed.tensors, wanted, len(likely))
            places = dict(zip(wanted, range(len(wanted)), strict=True)) if sampling or asked else {}
        prompts = {
            item.seq_id: self._prompt_logprobs(item, states, model, hidden, places[first + rows.start - item.start])
            for item, first in asked
            if (rows := self._prompt_rows(item, states))
        }
        result = self._choose((*likely, *sampling), states, model, hidden, places, best)
        return StepResult(result.tokens, result.logprobs, prompts, result.errors)

    def _decode(
        self, decode: NativeDecode, items: Sequence[PlanItem], states: Mapping[str, SequenceState]
    ) -> StepResult | None:
        """The step, if each sequence is fed one token and just wants the most likely next one; else nothing is done."""
        ids: list[int] = []
        starts: list[int] = []
        tables: list[tuple[int, ...]] = []
        for item in items:
            if item.num_tokens != 1 or not item.samples or not states[item.seq_id].wants_most_likely:
                return None
            ids.append(item.token_ids[0] if item.token_ids else self.last_tokens[item.seq_id])
            starts.append(item.start)
            tables.append(item.block_table)
        tokens, errors = self._learn(items, decode(ids, starts, tables), states)
        return StepResult(tokens, errors=errors)

    def _sort(
        self, plan: StepPlan, states: Mapping[str, SequenceState], ends: list[int], watched: bool
    ) -> tuple[list[tuple[PlanItem, int]], list[tuple[PlanItem, int]], list[tuple[PlanItem, int]]]:
        """(item, its last row) of those that want the most likely token, unless the model is watched, and of the others
        that want one; (item, its first row) of those that want log-probabilities of their prompts."""
        likely: list[tuple[PlanItem, int]] = []
        sampling: list[tuple[PlanItem, int]] = []
        asked: list[tuple[PlanItem, int]] = []
        for item, first, end in zip(plan.items, ends, ends[1:], strict=False):
            state = states[item.seq_id]
            if item.samples:
                (likely if not watched and state.wants_most_likely else sampling).append((item, end - 1))
            if state.new.sampling.prompt_logprobs is not None and self._prompt_rows(item, states):
                asked.append((item, first))
        return likely, sampling, asked

    def _whole(
        self, whole: NativeStep, batch: BatchTensors, wanted: list[int], greedy: int
    ) -> tuple[torch.Tensor, list[int]]:
        rows: Any = np.array(wanted, np.int32)
        if self.wrap is not None:
            rows = self.wrap(rows)
        else:
            import torch

            rows = torch.from_numpy(rows)
        x = self.built.embed(batch.ids)  # type: ignore[attr-defined]
        return whole(
            x, batch.positions, batch.slots, batch.query_start, batch.seq_lens, batch.block_table, rows, greedy
        )

    def _choose(
        self,
        items: Sequence[tuple[PlanItem, int]],
        states: Mapping[str, SequenceState],
        model: Model,
        hidden: torch.Tensor,
        places: Mapping[int, int],
        best: list[int],
    ) -> StepResult:
        """The next token of each (item, its last row); those of the first items may be known already."""
        logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        chosen, raw, known = list(best), {}, len(best)
        left = items[known:]
        if left:
            rows = [SampleRow(states[item.seq_id], item.start + item.num_tokens) for item, _ in left]
            logits = self._logits(model, hidden, [places[row] for _, row in left])
            # Sampling adjusts in place.
            raw = {r: logits[r] + 0 for r, row in enumerate(rows) if row.state.new.sampling.logprobs is not None}
            drawn, finite = sample(logits, rows)
            chosen += [token if right else -1 for token, right in zip(drawn, finite, strict=True)]
        for r, line in raw.items():
            (item, _), token = left[r], chosen[known + r]
            if token >= 0:
                state = states[item.seq_id]
                logprobs[item.seq_id] = (token_logprobs(line, token, state.new.sampling.logprobs or 0),)
        tokens, errors = self._learn([item for item, _ in items], chosen, states)
        return StepResult(tokens, logprobs, errors=errors)

    def _learn(
        self, items: Sequence[PlanItem], chosen: Sequence[int], states: Mapping[str, SequenceState]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Tokens and errors of a step that chose these; -1: nothing finite to choose from."""
        tokens: dict[str, tuple[int, ...]] = {}
        errors: dict[str, str] = {}
        for item, token in zip(items, chosen, strict=True):
            seq_id = item.seq_id
            if token < 0:
                errors[seq_id] = NOT_FINITE
                continue
            tokens[seq_id] = (token,)
            states[seq_id].append(token)
            self.last_tokens[seq_id] = token
        return tokens, errors

    def _logits(self, model: Model, hidden: Any, rows: Sequence[int]) -> Any:
        """[R, vocab] float32 of those rows of the hidden states, numpy's or torch's as they are."""
        if not isinstance(hidden, Array):
            return model.logits(hidden[list(rows)]).float()
        logits: Any = model.logits(hidden.rows(rows))  # type: ignore[arg-type]
        return logits.float().values

    @staticmethod
    def _prompt_rows(item: PlanItem, states: Mapping[str, SequenceState]) -> range:
        return states[item.seq_id].new.prompt_rows(item.start, item.num_tokens)

    def _prompt_logprobs(
        self, item: PlanItem, states: Mapping[str, SequenceState], model: Model, hidden: torch.Tensor, place: int
    ) -> list[tuple[int, TokenLogprobs]]:
        """The row at position p predicts the prompt's token at p + 1; the first wanted one lies at `place`."""
        new = states[item.seq_id].new
        rows, top = self._prompt_rows(item, states), new.sampling.prompt_logprobs or 0
        found = []
        for begin in rows[::_LOGIT_ROWS]:
            end = min(begin + _LOGIT_ROWS, rows.stop)
            at = place + begin - rows.start
            logits = self._logits(model, hidden, range(at, at + end - begin))
            for position, line in zip(range(begin, end), logits, strict=True):
                found.append((position + 1, token_logprobs(line, new.prompt_token_ids[position + 1], top)))
        return found
