"""`StepPlan` in, tokens out: pack, forward, sample. The CPU form of the executor."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from liushui.config import EngineConfig
from liushui.core.plan import PlanItem, StepPlan, StepResult, TokenLogprobs
from liushui.kernels.ops import load_ops
from liushui.kernels.policy import KernelPolicy
from liushui.layers.batch import KVCache
from liushui.layers.weights import Weights
from liushui.models.registry import Model, ModelSizes, build, sizes
from liushui.runner import hardware
from liushui.runner.batch import pack
from liushui.runner.memory import KVPlan, plan_kv
from liushui.runner.sampler import SampleRow, sample, token_logprobs
from liushui.runner.state import SequenceState

_LOGIT_ROWS = 64
"""Rows of float32 logits made at once: a long prompt's log-probabilities must not fill the memory."""


class Checkpoint(Protocol):
    """What the runner reads of a checkpoint (see `loading`)."""

    config: dict[str, Any]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is finished when it returns."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class Runner:
    """Owns the model, the KV memory and the sampling state of live sequences."""

    def __init__(
        self, model: Model, sizes: ModelSizes, plan: KVPlan, dtype: torch.dtype, notes: list[str] | None = None
    ) -> None:
        self.model, self.vocab_size, self.dtype = model, sizes.vocab_size, dtype
        self.num_blocks, self.block_size, self.max_model_len = plan.num_blocks, plan.block_size, plan.max_model_len
        self.notes = [*(notes or []), *plan.notes]
        self.kv = KVCache.allocate(
            sizes.num_layers, plan.num_blocks, sizes.num_kv_heads, plan.block_size, sizes.head_dim, dtype
        )
        self.states: dict[str, SequenceState] = {}
        self.last_tokens: dict[str, int] = {}

    @classmethod
    def load(cls, config: EngineConfig, checkpoint: Checkpoint) -> "Runner":
        """Read the weights, choose the kernels, size the KV cache."""
        started = time.perf_counter()
        threads = hardware.set_threads(config.threads)
        dtype = hardware.pick_dtype(config.dtype)
        shape = sizes(checkpoint.config)
        ops = load_ops(config.kernels, threads)
        policy = KernelPolicy(ops, config.numerics)
        longest = min(config.max_model_len or shape.max_positions, shape.max_positions)
        weights = Weights(checkpoint.names(), checkpoint.shape, checkpoint.load, dtype)
        with torch.inference_mode():
            model = build(checkpoint.config, weights, policy, longest)
        plan = plan_kv(config, shape, dtype, hardware.free_memory_bytes())
        notes = [
            f"model: {shape.architecture}, {str(dtype).removeprefix('torch.')}, weights read in "
            f"{time.perf_counter() - started:.2f} s",
            f"{policy.describe()}; {threads} threads",
        ]
        if getattr(ops, "note", None):
            notes.append(str(ops.note))
        return cls(model, shape, plan, dtype, notes)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Done:
        """Run one step. The result is ready on return: on a CPU there is nothing to overlap with."""
        for seq_id in plan.dropped:
            self.states.pop(seq_id, None)
            self.last_tokens.pop(seq_id, None)
        for new in plan.new:
            self.states[new.seq_id] = SequenceState(new)
        packed = pack(plan, self.block_size, self.last_tokens)
        hidden = self.model.forward(self.kv, packed.tensors)
        starts = packed.query_start.tolist()
        prompt_logprobs = {
            item.seq_id: self._prompt_logprobs(item, hidden[first:last])
            for item, first, last in zip(plan.items, starts, starts[1:], strict=False)
            if self._wants_prompt_logprobs(item)
        }
        sampling = [(item, last - 1) for item, last in zip(plan.items, starts[1:], strict=True) if item.samples]
        result = self._sample(sampling, hidden) if sampling else StepResult(tokens={})
        return Done(StepResult(result.tokens, result.logprobs, prompt_logprobs, result.errors))

    def _sample(self, items: "list[tuple[PlanItem, int]]", hidden: torch.Tensor) -> StepResult:
        """Choose the next token of each (item, its last row)."""
        rows = [SampleRow(self.states[item.seq_id], item.start + item.num_tokens) for item, _ in items]
        logits = self.model.logits(hidden[[row for _, row in items]]).float()
        asked = {i: row.state.new.sampling.logprobs for i, row in enumerate(rows)}
        raw = {i: logits[i].clone() for i, top in asked.items() if top is not None}  # sampling adjusts in place
        chosen, finite = sample(logits, rows)
        tokens: dict[str, tuple[int, ...]] = {}
        logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        errors: dict[str, str] = {}
        for i, (item, _) in enumerate(items):
            if not finite[i]:
                errors[item.seq_id] = "the model gave logits that are not finite (NaN or infinity)"
                continue
            tokens[item.seq_id] = (chosen[i],)
            if i in raw:
                logprobs[item.seq_id] = (token_logprobs(raw[i], chosen[i], asked[i] or 0),)
            rows[i].state.append(chosen[i])
            self.last_tokens[item.seq_id] = chosen[i]
        return StepResult(tokens, logprobs, errors=errors)

    def _wants_prompt_logprobs(self, item: PlanItem) -> bool:
        new = self.states[item.seq_id].new
        return new.sampling.prompt_logprobs is not None and item.start < len(new.prompt_token_ids) - 1

    def _prompt_logprobs(self, item: PlanItem, hidden: torch.Tensor) -> list[tuple[int, TokenLogprobs]]:
        """The row at position p predicts the prompt's token at p + 1."""
        new = self.states[item.seq_id].new
        last = min(item.start + item.num_tokens, len(new.prompt_token_ids) - 1)
        top = new.sampling.prompt_logprobs or 0
        found = []
        for begin in range(item.start, last, _LOGIT_ROWS):
            end = min(begin + _LOGIT_ROWS, last)
            logits = self.model.logits(hidden[begin - item.start : end - item.start]).float()
            for position, line in zip(range(begin, end), logits, strict=True):
                found.append((position + 1, token_logprobs(line, new.prompt_token_ids[position + 1], top)))
        return found


if TYPE_CHECKING:
    from liushui.core.plan import Executor

    def _is_executor(runner: Runner) -> Executor:
        return runner
