"""Steps on a CUDA device: staged in one copy, run as a CUDA graph, chosen tokens kept there for the next step.

A step's launches depend on its `StepShape` only. The first steps of a shape run kernel by kernel, while the vendor's
products are chosen; the next one is captured, and it and all later ones are replayed. The largest steps keep the
device busy for longer than the host needs to launch them: they are not captured. `start` returns before the device has
begun; the tokens come back with `DeviceStep.result`. Sequences whose logits are adjusted by what was generated before
(penalties, banned stops) make the step wait for the ones before it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from liushui.core.plan import PlanItem, StepPlan, StepResult, TokenLogprobs
from liushui.kernels.triton import products, sampling
from liushui.kernels.triton.common import Kernel
from liushui.kernels.triton.ops import TritonOps
from liushui.layers.batch import KVCache
from liushui.layers.experts import Experts
from liushui.layers.fused import forward_of
from liushui.layers.one_row import OneRow
from liushui.models.registry import Model
from liushui.runner.sampler import SampleRow, adjust
from liushui.runner.staging import RING, SampleTensors, Staging, StepShape
from liushui.runner.state import SequenceState

LOG = logging.getLogger("liushui.runner")
NOT_FINITE = "the model gave logits that are not finite (NaN or infinity)"
MAX_GRAPHS = 256
MAX_FAILURES = 3
"""Captures that may fail before no more are tried."""
GRAPH_VALUES = 2**24
"""Most hidden values (rows times hidden size) of a step that is captured: some 40 ms on an H100."""
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Padded numbers of sequences of a step that also feeds prompts."""
_FIRST_ROWS = (128, 256)
"""Padded rows of a short prompt."""
_PROMPT_ROWS = 64
"""Rows whose prompt log-probabilities are made at once."""


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that holds `count`."""
    return next((size for size in sizes if size >= count), -(-count // 256) * 256)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step leaves on the device; overwritten by the next replay."""

    hidden: torch.Tensor
    """[T, H]."""
    logits: torch.Tensor
    """[S, vocab], of the sampled rows."""
    chosen: torch.Tensor
    """[S] int32: tokens; -1 where the logits were not finite."""


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities on their way to the host: of some rows, each with its `wanted` best."""

    rows: list[int]
    wanted: list[int]
    tensors: tuple[torch.Tensor, ...]

    def read(self) -> list[tuple[float, int, tuple[tuple[int, float], ...]]]:
        values, ranks, top_values, top_tokens = (tensor.tolist() for tensor in self.tensors)
        tops = (
            tuple(zip(t[:count], v[:count], strict=True))
            for t, v, count in zip(top_tokens, top_values, self.wanted, strict=True)
        )
        return list(zip(values, ranks, tops, strict=True))


@dataclass(slots=True)
class DeviceStep:
    """A step under way."""

    sampled: tuple[PlanItem, ...]
    states: Mapping[str, SequenceState]
    tokens: torch.Tensor
    """[>= sampled] int32, pinned: valid once `done`."""
    done: torch.cuda.Event | None
    logprobs: Logprobs | None = None
    prompts: dict[str, list[tuple[int, list[int], Logprobs]]] = field(default_factory=dict)
    """(first position, prompt tokens, their log-probabilities) of each piece."""
    value: StepResult | None = None
    alone: bool = False

    def result(self) -> StepResult:
        if self.value is None:
            if self.done is not None:
                self.done.synchronize()
            self.value = self._read()
        return self.value

    def _read(self) -> StepResult:
        tokens: dict[str, tuple[int, ...]] = {}
        errors: dict[str, str] = {}
        for item, token in zip(self.sampled, self.tokens[: len(self.sampled)].tolist(), strict=True):
            if token < 0:
                errors[item.seq_id] = NOT_FINITE
                continue
            tokens[item.seq_id] = (token,)
            if item.seq_id in self.states:
                self.states[item.seq_id].append(token)
        logprobs = {}
        if self.logprobs is not None:
            for row, (value, rank, top) in zip(self.logprobs.rows, self.logprobs.read(), strict=True):
                seq_id = self.sampled[row].seq_id
                if seq_id in tokens:
                    logprobs[seq_id] = (TokenLogprobs(tokens[seq_id][0], value, rank, top),)
        prompts = {
            seq_id: [
                (position + i, TokenLogprobs(token, *found))
                for position, ids, piece in pieces
                for i, (token, found) in enumerate(zip(ids, piece.read(), strict=False))
            ]
            for seq_id, pieces in self.prompts.items()
        }
        return StepResult(tokens, logprobs, prompts, errors)


class DeviceSteps:
    """Runs plans on one device. Owns the staging buffers, the graphs and the tokens that feed the next step."""

    def __init__(
        self, model: Model, ops: TritonOps, kv: KVCache, device: torch.device, block_size: int, limits: StepShape
    ) -> None:
        """`limits`: the largest step: token rows, sequences, and blocks of one sequence."""
        self.model, self.ops, self.kv, self.device = model, ops, kv, device
        self.one_row = OneRow(model, ops, kv, limits.width)
        self.forward = forward_of(model, ops, self.one_row)
        sequences = bucket(limits.sequences, products.BUCKETS)
        rows = bucket(max(limits.rows, sequences), products.BUCKETS)
        self.max_width = limits.width
        self.staging = Staging(device, sequences, rows, self.max_width, block_size)
        self.graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self.graph_failure: str | None = None
        """Why no more steps are captured."""
        self._settles: threading.Event | None = None
        self._begun: threading.Event | None = None
        if any(isinstance(getattr(layer, "mlp", None), Experts) for layer in getattr(model, "layers", ())):
            self.graph_failure = "the host picks the experts"
        self._seen: dict[StepShape, int] = {}
        """Hidden values of the steps that ran kernel by kernel."""
        self._failures = 0
        self._pool: Any = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._feed = ops.feed = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._back = [torch.zeros(sequences, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self._turn = 0
        self._flying: deque[DeviceStep] = deque(maxlen=RING - 1)

    def choose_products(self, enough: Callable[[], bool]) -> None:
        """Until `enough`: certificates for a short prompt, which its first step would wait for."""
        with torch.inference_mode():
            for rows in _FIRST_ROWS:
                for product in self.ops.weights.values():
                    if enough():
                        return
                    self.ops.choose(rows, *product)

    def settle_once(self, ready: threading.Event, begun: threading.Event | None = None) -> list[str]:
        """Before the first step of one row after `ready`, `settle`; lines for the start-up report.

        Until then each step is read before the next one is launched, which may wait for a kernel. `begun` is set with
        the first step: before it, where it needs other kernels than one sequence's prompt.
        """
        self._settles, self._begun = ready, begun
        return [
            *([self.one_row.note] if self.one_row.note else []),
            *self.ops.forms.report(),
            *self.ops.prompts.report(),
        ]

    def settle(self) -> None:
        """Try what serves only if it proves right here: steps of one row as one kernel."""
        self._settles = None
        try:
            with torch.inference_mode():
                self.one_row.certify()
        except torch.OutOfMemoryError:
            self.one_row.decoder = None
        LOG.info(self.one_row.note)
        self._seen = {shape: size for shape, size in self._seen.items() if shape.rows > 1}
        self.graphs = {shape: kept for shape, kept in self.graphs.items() if shape.rows > 1}

    def start(self, plan: StepPlan, states: Mapping[str, SequenceState]) -> DeviceStep:
        """Launch one step."""
        # The longest first: attention's programs start in this order, and the short ones fill the gaps at the end.
        plan = plan._replace(items=tuple(sorted(plan.items, key=lambda item: -item.start - item.num_tokens)))
        sampled = tuple(item for item in plan.items if item.samples)
        adjusted = [i for i, item in enumerate(sampled) if states[item.seq_id].adjusts_logits]
        # The oldest step's buffers are about to be used again; adjusting needs all that was generated.
        for step in list(self._flying) if adjusted else list(self._flying)[: max(0, len(self._flying) - RING + 2)]:
            step.result()
        shape = self.shape(plan, states)
        self.staging.fill(plan, shape, states)
        if self._begun is not None and (shape.limited or shape.sequences > 1 or shape.rows <= 64):
            self._begun.set()
        out = self._run(shape)
        if adjusted:
            self._adjust(out, shape, sampled, adjusted, states)
        step = DeviceStep(sampled, states, self._send_back(out.chosen), None)
        step.logprobs = self._logprobs(out, sampled, states)
        step.prompts = self._prompt_logprobs(plan, out, states)
        if self.device.type == "cuda":
            step.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.done.record()
        step.alone = self._settles is not None and not self._settles.is_set()
        if self._begun is not None:
            self._begun.set()
            self._begun = None
        self._flying.append(step)
        return step

    def shape(self, plan: StepPlan, states: Mapping[str, SequenceState]) -> StepShape:
        """The padded sizes of the plan: those of the captured graphs."""
        count, rows = len(plan.items), plan.num_tokens
        width = self.max_width
        if width > 128:
            width = min(width, 1 << (max(128, self.staging.width(plan)) - 1).bit_length())
        limited = self.staging.limited(plan, states)
        if rows == count:
            size = bucket(count, products.BUCKETS)
            return StepShape(size, size, width, limited)
        sequences = min(bucket(count, _SEQUENCES), self.staging.max_num_seqs)
        return StepShape(bucket(max(rows, sequences + 1), products.BUCKETS), sequences, width, limited)

    def _run(self, shape: StepShape) -> Outputs:
        if shape.rows == 1 and self._settles is not None and self._settles.is_set():
            self.settle()
        again = shape in self._seen and shape not in self.graphs
        if again and self.ops.try_others():
            again = False
        elif self._settles is None or self._settles.is_set():  # what steps need is compiled before it
            self._try_forms()
        if again and self.graph_failure is None and len(self.graphs) < MAX_GRAPHS:  # noqa: SIM102
            if self._seen[shape] <= GRAPH_VALUES:
                self._capture(shape)
        if shape in self.graphs:
            graph, out = self.graphs[shape]
            graph.replay()
            return out
        out = self.compute(shape)
        coming = Kernel.coming or self.ops.prompts.coming
        standing_in = coming and shape.rows > shape.sequences  # a kernel, for one that is being compiled
        if self.device.type == "cuda" and not standing_in:
            self._seen[shape] = out.hidden.numel()
        return out

    def _try_forms(self) -> None:
        """Products that are compiled behind the steps. Graphs with those that no longer serve are captured anew.

        On the device a trial comes behind the step in flight and before this one: they do not disturb one another.
        """
        before = self.ops.forms.note
        if changed := self.ops.try_forms():
            kept = {s: g for s, g in self.graphs.items() if changed.isdisjoint((s.rows, s.sequences))}
            self.graphs = kept
        if self.ops.forms.note != before:
            LOG.info("own products for many rows: no more are tried (%s)", self.ops.forms.note)

    def finish(self) -> None:
        """Wait for what is compiled behind the first steps, and try now what steps would try one by one."""
        if self._begun is not None:
            self._begun.set()
        if self._settles is not None:
            self._settles.wait()
            self.settle()
        self.ops.prompts.wait()
        with torch.inference_mode():
            while self.ops.try_others():
                pass
            while self.ops.untried:
                self._try_forms()
                self.ops.forms.wait()

    def _capture(self, shape: StepShape) -> None:
        """Capture the step; a model that asks the host in between cannot be captured, and runs kernel by kernel.

        Not by `torch.cuda.graph`, which would wait for the device and give back the memory of the steps in between.
        """
        if not self.graphs:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._side):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    out = self.compute(shape)
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # for the next time
            return
        except RuntimeError as error:
            self._failed(shape, error)
            return
        self.graphs[shape] = graph, out

    def _failed(self, shape: StepShape, error: RuntimeError) -> None:
        """A model that was never captured cannot be; another one may fail with a few shapes or moments."""
        del self._seen[shape]
        self._failures += 1
        if not self.graphs or self._failures == MAX_FAILURES:
            self.graph_failure = str(error).splitlines()[0]
            LOG.warning("no more steps are captured as CUDA graphs, they take longer: %s", self.graph_failure)

    def compute(self, shape: StepShape) -> Outputs:
        """Launch the kernels of a step on what is staged."""
        batch, sample = self.staging.tensors(shape)
        hidden = self.forward(self.kv, batch)
        last = hidden if shape.rows == 1 else hidden.index_select(0, sample.rows)  # of one row it is that one
        logits = self.model.logits(last)
        return Outputs(hidden, logits, self._pick(logits, sample, shape.limited))

    def _pick(self, logits: torch.Tensor, sample: SampleTensors, limited: bool) -> torch.Tensor:
        chained, limits = self.ops.chained, None
        if limited:
            limits = sampling.limits(
                logits, sample.temperatures, sample.top_ks, sample.top_ps, sample.min_ps, chained
            )  # fmt: skip
        return sampling.pick(
            logits, sample.keys, sample.temperatures, limits, self._feed, sample.places, self.ops.arrived, chained
        )

    def _adjust(
        self, out: Outputs, shape: StepShape, sampled: tuple[PlanItem, ...], rows: list[int],
        states: Mapping[str, SequenceState],
    ) -> None:  # fmt: skip
        """Choose once more for the rows with bias, penalties or banned stops."""
        index = torch.tensor(rows, device=self.device)
        logits = out.logits[index].float()
        adjust(logits, [SampleRow(states[sampled[i].seq_id], 0) for i in rows])
        _, sample = self.staging.tensors(shape)
        parts = {name: getattr(sample, name)[index].contiguous() for name in SampleTensors.__slots__}
        out.chosen[index] = self._pick(logits, SampleTensors(**parts), shape.limited)

    def _send_back(self, chosen: torch.Tensor) -> torch.Tensor:
        buffer = self._back[self._turn][: len(chosen)]
        self._turn = (self._turn + 1) % RING
        return buffer.copy_(chosen, non_blocking=True)

    def _logprobs(
        self, out: Outputs, sampled: tuple[PlanItem, ...], states: Mapping[str, SequenceState]
    ) -> Logprobs | None:
        asked = [states[item.seq_id].new.sampling.logprobs for item in sampled]
        rows = [i for i, wanted in enumerate(asked) if wanted is not None]
        if not rows:
            return None
        index = torch.tensor(rows, device=self.device)
        return self._measure(out.logits[index], out.chosen[index], rows, [asked[i] or 0 for i in rows])

    def _measure(self, logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], wanted: list[int]) -> Logprobs:
        found = sampling.logprobs(logits, tokens, max(wanted), self.ops.chained)
        if self.device.type == "cuda":
            found = tuple(  # type: ignore[assignment]
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
                for part in found
            )
        return Logprobs(rows, wanted, found)

    def _prompt_logprobs(
        self, plan: StepPlan, out: Outputs, states: Mapping[str, SequenceState]
    ) -> dict[str, list[tuple[int, list[int], Logprobs]]]:
        """The row at position p predicts the prompt's token at p + 1. Pieces of one size: one order of sums."""
        found: dict[str, list[tuple[int, list[int], Logprobs]]] = {}
        row = 0
        for item in plan.items:
            new = states[item.seq_id].new
            if rows := new.prompt_rows(item.start, item.num_tokens):
                pieces = found.setdefault(item.seq_id, [])
                for start in rows[::_PROMPT_ROWS]:
                    ids = list(new.prompt_token_ids[start + 1 : min(start + _PROMPT_ROWS, rows.stop) + 1])
                    first = row + start - item.start
                    at = torch.arange(first, first + _PROMPT_ROWS, device=self.device).clamp(max=len(out.hidden) - 1)
                    tokens = torch.zeros(_PROMPT_ROWS, dtype=torch.int32)
                    tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
                    logits = self.model.logits(out.hidden[at])[: len(ids)]
                    wanted = [new.sampling.prompt_logprobs or 0] * len(ids)
                    piece = self._measure(logits, tokens[: len(ids)].to(self.device), [], wanted)
                    pieces.append((start + 1, ids, piece))
            row += item.num_tokens
        return found
