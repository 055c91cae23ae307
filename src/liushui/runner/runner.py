"""`StepPlan` in, tokens out: pack, forward, sample. On a CPU here, on a GPU in `device`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from liushui.config import EngineConfig
from liushui.core.plan import Pending, StepPlan
from liushui.errors import ParameterError
from liushui.kernels.arrays import type_name
from liushui.kernels.ops import Ops, load_native, load_ops
from liushui.kernels.policy import KernelPolicy
from liushui.layers.batch import KVCache
from liushui.layers.rows import NotPlainError, RowWeights
from liushui.models.registry import WHOLE, Model, ModelSizes, build, sizes
from liushui.runner import forms, hardware
from liushui.runner.early import collector_at_rest, compilers_tools
from liushui.runner.fresh import TOKENS_AHEAD, Fresh
from liushui.runner.host import HostSteps
from liushui.runner.memory import KVPlan, pick_kv_dtype, plan_kv
from liushui.runner.state import SequenceState


class Checkpoint(Protocol):
    """What the runner reads of a checkpoint (see `loading`)."""

    config: dict[str, Any]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...


class Runner:
    """Owns the model, the KV memory and the sampling state of live sequences."""

    def __init__(
        self,
        model: Model,
        sizes: ModelSizes,
        plan: KVPlan,
        dtype: Any,
        notes: list[str] | None = None,
        device: torch.device | None = None,
        kv_dtype: Any = None,
    ) -> None:
        """`dtype`, `kv_dtype`: torch's types, or their names for a model of `Array`s."""
        self._model, self.vocab_size, self.dtype = model, sizes.vocab_size, dtype
        self.num_blocks, self.block_size, self.max_model_len = plan.num_blocks, plan.block_size, plan.max_model_len
        self.cache_room = plan.cache_room
        self.notes = [*(notes or []), *plan.notes]
        self.kv = KVCache.allocate(
            sizes.num_layers, plan.num_blocks, sizes.num_kv_heads, plan.block_size, sizes.head_dim, kv_dtype or dtype,
            device,
        )  # fmt: skip
        self.states: dict[str, SequenceState] = {}
        self.host = HostSteps(model, self.kv, plan.block_size)
        self.steps: DeviceSteps | None = None
        """Where steps run if not here: on a GPU."""
        self.quantised, self.in_blocks = False, False
        """Whether weights were quantised at load, or are held in the file's blocks; products then round their rows."""
        self.depth = 0
        """Steps worth keeping in flight while the next one is planned."""
        self._source: tuple[EngineConfig, Any] | None = None
        """Of a model of `Array`s: what it was made from."""

    @classmethod
    def load(cls, config: EngineConfig, checkpoint: Checkpoint) -> Runner:
        """Read the weights, choose the kernels, size the KV cache. Torch is loaded only where it is needed."""
        started = time.perf_counter()
        with collector_at_rest():
            runner = cls._load_plain(config, checkpoint, started) if may_be_plain(config, checkpoint) else None
            return runner or cls._load_any(config, checkpoint, started)

    @classmethod
    def _load_plain(cls, config: EngineConfig, checkpoint: Any, started: float) -> Runner | None:
        """All by the native library, without torch; None where that cannot be."""
        threads = config.threads or hardware.default_threads()
        config = config.settled(False)
        ops: Any = load_native(threads)
        if ops is None:
            return None
        dtype, shape = hardware.host_dtype(config.dtype), sizes(checkpoint.config)
        form = forms.choose(config.weights, ops, dtype, checkpoint, config.numerics)
        policy = KernelPolicy(ops, config.numerics, form.quantise, expand=form.expand)
        held, kept = form.quantise or form.dtype, ops.block_types if form.blocks is not None else frozenset()
        weights = RowWeights(
            checkpoint.names(), checkpoint.shape, checkpoint.load_rows, ops.products, dtype, held, kept
        )
        longest = min(config.max_model_len or shape.max_positions, shape.max_positions)
        try:
            model = build(checkpoint.config, weights, policy, longest)
        except NotPlainError:
            return None
        ops.share_threads(with_torch=False)
        kv_dtype = pick_kv_dtype(config, dtype, ops.name)
        plan = plan_kv(config, shape, kv_dtype, hardware.free_memory_bytes())
        notes = notes_of(shape, dtype, started, form, policy, ops, threads, kv_dtype)
        runner = cls(model, shape, plan, dtype, notes, None, kv_dtype)
        runner.quantised, runner.in_blocks = form.quantise is not None, form.blocks is not None
        runner.host.prepare(ops, config.step_tokens, config.seats)
        if runner.host.whole is None:
            return None
        runner._source = config, checkpoint
        return runner

    @classmethod
    def _load_any(cls, config: EngineConfig, checkpoint: Checkpoint, started: float) -> Runner:
        import torch

        from liushui.layers.weights import Weights
        from liushui.runner.gpu_memory import named_when_exhausted, reserve_for_steps

        threads = hardware.set_threads(config.threads)
        device = hardware.pick_device(config.device)
        config = config.settled(device.type == "cuda")
        dtype = hardware.pick_dtype(config.dtype, device)
        shape = sizes(checkpoint.config)
        ops = pick_ops(config, device, threads)
        form = forms.choose(config.weights, ops, dtype, checkpoint, config.numerics)
        policy = KernelPolicy(ops, config.numerics, form.quantise, expand=form.expand)
        longest = min(config.max_model_len or shape.max_positions, shape.max_positions)
        on_gpu = device.type == "cuda"
        reserve, rehearsal = 0, None
        if on_gpu:
            from liushui.runner.rehearsal import Rehearsal

            reserve = reserve_for_steps(config, checkpoint, dtype, hardware.free_gpu_bytes(device, 0))
            rehearsal = Rehearsal(checkpoint, shape, config, dtype, device, longest)
        weights = Weights(checkpoint.names(), checkpoint.shape, checkpoint.load, dtype, device, form.dtype, form.blocks)
        try:
            with torch.inference_mode(), named_when_exhausted(device):
                model = build(checkpoint.config, weights, policy, longest)
        finally:
            weights.close()
        if ops.name == "native":
            ops.share_threads(with_torch=policy.uses_vendor)  # type: ignore[attr-defined]
            if not policy.uses_vendor:
                # What is left to torch is small, and threads of its own would wait for work on the step's processors.
                torch.set_num_threads(1)
        free = hardware.free_gpu_bytes(device, reserve) if on_gpu else hardware.free_memory_bytes()
        kv_dtype = pick_kv_dtype(config, dtype, ops.name)
        plan = plan_kv(config, shape, kv_dtype, free, on_gpu=on_gpu)
        notes = notes_of(shape, dtype, started, form, policy, ops, threads, kv_dtype)
        with named_when_exhausted(device):
            runner = cls(model, shape, plan, dtype, notes, device, kv_dtype)
        runner.quantised, runner.in_blocks = form.quantise is not None, form.blocks is not None
        if ops.name == "triton":
            runner._run_on(device, ops, config)
        else:
            runner.host.prepare(ops, config.step_tokens, config.seats)
        if rehearsal is not None and runner.steps is not None:
            compilers_tools().join()  # this thread will compile too
            runner.steps.choose_products(rehearsal.is_ready)
            runner.notes.append(rehearsal.first())
            runner.notes += runner.steps.settle_once(rehearsal.finished, rehearsal.begun)
        return runner

    @property
    def model(self) -> Any:
        """The model, whose layers run one by one. A runner that did without torch loads it now; the cache stays."""
        if self._source is not None:
            self._load_layers(*self._source)
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model

    def _load_layers(self, config: EngineConfig, checkpoint: Any) -> None:
        whole = Runner._load_any(config, checkpoint, time.perf_counter())
        views = [part.tensor() for part in (self.kv.keys, self.kv.values, *(self.kv.scales or ()))]
        kv = KVCache(views[0], views[1], (views[2], views[3]) if len(views) > 2 else None)
        whole.host.kv = whole.kv = kv
        whole.host.last_tokens = self.host.last_tokens
        whole.host.prepare(whole.model.policy.ops, config.step_tokens, config.seats)
        self._model, self.kv, self.host, self.dtype = whole.model, kv, whole.host, whole.dtype
        self._source = None

    def _run_on(self, device: torch.device, ops: Ops, config: EngineConfig) -> None:
        """Let steps run on a device, one ahead of the host."""
        from liushui.runner.device import DeviceSteps
        from liushui.runner.staging import StepShape

        width = -(-self.max_model_len // self.block_size)
        largest = StepShape(config.step_tokens, config.seats, width, False)
        self.steps = DeviceSteps(self._model, ops, self.kv, device, self.block_size, largest)  # type: ignore[arg-type]
        self.depth = 1
        if self.steps.graph_failure is not None:
            self.notes.append(f"steps are not captured as CUDA graphs: {self.steps.graph_failure}")

    def stay_ahead(self) -> None:
        """From now on, have memory of the KV cache made before steps need it: where somebody waits for each of them."""
        if self.steps is None:
            self.host.fresh = Fresh(self.kv, -(-TOKENS_AHEAD // self.block_size))

    def execute(self, plan: StepPlan) -> Pending:
        """Run one step. On a CPU, where there is nothing to overlap with, the result is ready on return."""
        for seq_id in plan.dropped:
            self.states.pop(seq_id, None)
            self.host.forget(seq_id)
        for new in plan.new:
            self.states[new.seq_id] = SequenceState(new)
        if self._source is not None:
            return self.host.run(plan, self.states, self._model)
        import torch

        with torch.inference_mode():
            if self.steps is not None:
                return self.steps.start(plan, self.states)
            return self.host.run(plan, self.states, self._model)


def may_be_plain(config: EngineConfig, checkpoint: Any) -> bool:
    """Whether the model may run without torch: on the processor, by native kernels alone, from readable rows."""
    if config.kernels not in ("auto", "native") or config.numerics != "invariant" or config.device == "cuda":
        return False
    names = checkpoint.config.get("architectures") or [""]
    known = names[0] in WHOLE and hasattr(checkpoint, "load_rows")
    return known and (config.device == "cpu" or not hardware.may_have_gpu())


def notes_of(
    shape: ModelSizes, dtype: Any, started: float, form: forms.Form, policy: KernelPolicy, ops: Ops, threads: int,
    kv_dtype: Any,
) -> list[str]:  # fmt: skip
    """The runner's lines of the start-up report."""
    notes = [
        f"model: {shape.architecture}, {type_name(dtype)}, weights read in {time.perf_counter() - started:.2f} s",
        form.note,
        f"{policy.describe()}; {threads} threads",
    ]
    if getattr(ops, "note", None):
        notes.append(str(ops.note))
    if type_name(kv_dtype) == "int8":
        notes.append("KV cache in int8, with a scale for each token and head: answers differ a little")
    return notes


def pick_ops(config: EngineConfig, device: torch.device, threads: int) -> Ops:
    """The kernels for the device. Raises `ParameterError` where those asked for do not run there."""
    if device.type == "cpu" and config.kernels != "triton":
        return load_ops(config.kernels, threads)
    if config.kernels not in ("auto", "triton"):
        raise ParameterError("kernels", f"{config.kernels} kernels run on the processor; choose auto, or device cpu")
    try:
        from liushui.kernels.triton.launchers import INTERPRETED
        from liushui.kernels.triton.ops import TritonOps
    except ImportError as missing:
        raise ParameterError(
            "device", f"a GPU needs the package triton ({missing}): pip install 'liushui[gpu]', or choose device cpu"
        ) from None
    if device.type == "cpu" and not INTERPRETED:
        raise ParameterError("kernels", "triton kernels need a GPU; choose auto")
    if config.numerics == "fast":
        raise ParameterError(
            "numerics", "fast is for the processor: on a GPU nothing showed that it would be faster; leave it invariant"
        )
    return TritonOps(device)


if TYPE_CHECKING:
    import torch

    from liushui.core.plan import Executor
    from liushui.runner.device import DeviceSteps

    def _is_executor(runner: Runner) -> Executor:
        return runner
