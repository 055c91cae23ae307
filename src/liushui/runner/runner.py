"""`StepPlan` in, tokens out: pack, forward, sample. On a CPU here, on a GPU in `device`."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from liushui.config import EngineConfig
from liushui.core.plan import Pending, PlanItem, StepPlan, StepResult, TokenLogprobs
from liushui.errors import CapacityError, ParameterError
from liushui.kernels.ops import Ops, load_ops
from liushui.kernels.policy import KernelPolicy
from liushui.layers.batch import KVCache
from liushui.layers.weights import Weights
from liushui.models.registry import Model, ModelSizes, build, sizes
from liushui.runner import hardware
from liushui.runner.batch import pack
from liushui.runner.memory import GIB, KVPlan, plan_kv
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
        self,
        model: Model,
        sizes: ModelSizes,
        plan: KVPlan,
        dtype: torch.dtype,
        notes: list[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.vocab_size, self.dtype = model, sizes.vocab_size, dtype
        self.num_blocks, self.block_size, self.max_model_len = plan.num_blocks, plan.block_size, plan.max_model_len
        self.notes = [*(notes or []), *plan.notes]
        self.kv = KVCache.allocate(
            sizes.num_layers, plan.num_blocks, sizes.num_kv_heads, plan.block_size, sizes.head_dim, dtype, device
        )
        self.states: dict[str, SequenceState] = {}
        self.last_tokens: dict[str, int] = {}
        self.steps: DeviceSteps | None = None
        """Where steps run if not here: on a GPU."""
        self.depth = 0
        """Steps worth keeping in flight while the next one is planned."""

    @classmethod
    def load(cls, config: EngineConfig, checkpoint: Checkpoint) -> "Runner":
        """Read the weights, choose the kernels, size the KV cache."""
        started = time.perf_counter()
        threads = hardware.set_threads(config.threads)
        device = hardware.pick_device(config.device)
        config = config.settled(device.type == "cuda")
        dtype = hardware.pick_dtype(config.dtype, device)
        shape = sizes(checkpoint.config)
        ops = pick_ops(config, device, threads)
        policy = KernelPolicy(ops, config.numerics)
        longest = min(config.max_model_len or shape.max_positions, shape.max_positions)
        on_gpu = device.type == "cuda"
        reserve = step_bytes(config, checkpoint.config) if on_gpu else 0
        if on_gpu:
            check_weights_fit(checkpoint, dtype, hardware.free_gpu_bytes(device, 0), reserve)
        rehearsal = None
        if on_gpu:
            from liushui.runner.rehearsal import Rehearsal

            rehearsal = Rehearsal(checkpoint, shape, config, dtype, device, longest)
        weights = Weights(checkpoint.names(), checkpoint.shape, checkpoint.load, dtype, device)
        try:
            with torch.inference_mode():
                model = build(checkpoint.config, weights, policy, longest)
        finally:
            weights.close()
        if ops.name == "native":
            ops.share_threads(with_torch=policy.uses_vendor)  # type: ignore[attr-defined]
        free = hardware.free_gpu_bytes(device, reserve) if on_gpu else hardware.free_memory_bytes()
        plan = plan_kv(config, shape, dtype, free, on_gpu=on_gpu)
        notes = [
            f"model: {shape.architecture}, {str(dtype).removeprefix('torch.')}, weights read in "
            f"{time.perf_counter() - started:.2f} s",
            f"{policy.describe()}; {threads} threads",
        ]
        if getattr(ops, "note", None):
            notes.append(str(ops.note))
        runner = cls(model, shape, plan, dtype, notes, device)
        if ops.name == "triton":
            runner._run_on(device, ops, config)
        if rehearsal is not None:
            runner.notes.append(rehearsal.finish())
        return runner

    def _run_on(self, device: torch.device, ops: Ops, config: EngineConfig) -> None:
        """Let steps run on a device, one ahead of the host."""
        from liushui.runner.device import DeviceSteps
        from liushui.runner.staging import StepShape

        width = -(-self.max_model_len // self.block_size)
        largest = StepShape(config.step_tokens, config.seats, width, False)
        self.steps = DeviceSteps(self.model, ops, self.kv, device, self.block_size, largest)  # type: ignore[arg-type]
        self.depth = 1

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Pending:
        """Run one step. On a CPU, where there is nothing to overlap with, the result is ready on return."""
        for seq_id in plan.dropped:
            self.states.pop(seq_id, None)
            self.last_tokens.pop(seq_id, None)
        for new in plan.new:
            self.states[new.seq_id] = SequenceState(new)
        if self.steps is not None:
            return self.steps.start(plan, self.states)
        packed = pack(plan, self.block_size, self.last_tokens)
        hidden = self.model.forward(self.kv, packed.tensors)
        starts = packed.query_start.tolist()
        prompt_logprobs = {
            item.seq_id: self._prompt_logprobs(item, hidden[first:last])
            for item, first, last in zip(plan.items, starts, starts[1:], strict=False)
            if self.states[item.seq_id].new.prompt_rows(item.start, item.num_tokens)
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

    def _prompt_logprobs(self, item: PlanItem, hidden: torch.Tensor) -> list[tuple[int, TokenLogprobs]]:
        """The row at position p predicts the prompt's token at p + 1."""
        new = self.states[item.seq_id].new
        rows, top = new.prompt_rows(item.start, item.num_tokens), new.sampling.prompt_logprobs or 0
        found = []
        for begin in rows[::_LOGIT_ROWS]:
            end = min(begin + _LOGIT_ROWS, rows.stop)
            logits = self.model.logits(hidden[begin - item.start : end - item.start]).float()
            for position, line in zip(range(begin, end), logits, strict=True):
                found.append((position + 1, token_logprobs(line, new.prompt_token_ids[position + 1], top)))
        return found


def pick_ops(config: EngineConfig, device: torch.device, threads: int) -> Ops:
    """The kernels for the device. Raises `ParameterError` where those asked for do not run there."""
    if device.type == "cpu" and config.kernels != "triton":
        return load_ops(config.kernels, threads)
    if config.kernels not in ("auto", "triton"):
        raise ParameterError("kernels", f"{config.kernels} kernels run on the processor; choose auto, or device cpu")
    try:
        from liushui.kernels.triton.common import INTERPRETED
        from liushui.kernels.triton.ops import TritonOps
    except ImportError as missing:
        raise ParameterError(
            "device", f"a GPU needs the package triton ({missing}): pip install 'liushui[gpu]', or choose device cpu"
        ) from None
    if device.type == "cpu" and not INTERPRETED:
        raise ParameterError("kernels", "triton kernels need a GPU; choose auto")
    return TritonOps(device)


def step_bytes(config: EngineConfig, model: Mapping[str, Any]) -> int:
    """Device memory to keep for the steps: activations, logits, captured graphs and the vendor's work space.

    Twice what one step holds at once: a step outside the graphs does not share their memory. And room for the trial
    product of the largest weight's certificate, which works on a changed copy.
    """
    rows = max(config.step_tokens, config.seats)
    hidden = int(model.get("hidden_size") or model["n_embd"])
    inner = int(model.get("intermediate_size") or model.get("n_inner") or 4 * hidden)
    vocab = int(model["vocab_size"])
    step = 2 * rows * (3 * inner + 8 * hidden) + 6 * config.seats * vocab
    return 3 * GIB // 2 + 2 * step + 3 * max(vocab, 2 * inner) * hidden


def check_weights_fit(checkpoint: Checkpoint, dtype: torch.dtype, free: int, reserve: int) -> None:
    """Raise `CapacityError`, with the numbers, if the device cannot hold the weights and a step."""
    needed = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()) * dtype.itemsize
    if needed + reserve > free:
        raise CapacityError(
            "device",
            f"the weights take {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')} and a step "
            f"{reserve / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on the GPU; lower max_num_batched_tokens or "
            "max_num_seqs, free memory there, or choose a smaller model or device cpu",
        )


if TYPE_CHECKING:
    from liushui.core.plan import Executor
    from liushui.runner.device import DeviceSteps

    def _is_executor(runner: Runner) -> Executor:
        return runner
