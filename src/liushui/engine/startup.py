"""Start-up: every phase timed, every default that came from somewhere named."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from liushui.config import EngineConfig, ServingConfig
from liushui.core.blocks import BlockPool
from liushui.core.plan import Executor
from liushui.core.scheduler import Scheduler
from liushui.engine.attendant import Core
from liushui.engine.engine import Engine
from liushui.engine.events import House
from liushui.engine.suggestions import Suggestions
from liushui.engine.tokenizer import Tokenizer
from liushui.errors import CapacityError, ParameterError

T = TypeVar("T")


class Phases:
    """Named spans of time, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def close(self) -> None:
        """The end of start-up: what no phase accounts for is named as well."""
        total = time.perf_counter() - self._start
        self.seconds["other"] = max(total - sum(self.seconds.values()), 0.0)

    def line(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items() if seconds >= 0.005)
        return f"ready after {sum(self.seconds.values()):.2f} s ({parts})"


class CheckpointFacts(Protocol):
    """What a report says of a checkpoint."""

    @property
    def generation_config(self) -> Mapping[str, Any]: ...

    def describe(self) -> str: ...


class RunnerFacts(Executor, Protocol):
    """An executor that knows its sizes."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    notes: list[str]


def report(
    config: EngineConfig, checkpoint: CheckpointFacts, tokenizer: Tokenizer, runner: RunnerFacts, phases: Phases
) -> list[str]:
    """The start-up report, one fact a line: the files, the runner's own lines, the batch, prompts, time."""
    return [
        f"{config.model}: {checkpoint.describe()}",
        *runner.notes,
        batch_line(config, runner),
        prompt_line(tokenizer, config.chat_template),
        Suggestions.read(checkpoint.generation_config).line(config.generation_config),
        phases.line(),
    ]


def batch_line(config: EngineConfig, runner: RunnerFacts) -> str:
    """How large a step may be."""
    return (
        f"batch: {config.policy}, up to {config.seats} sequences and {config.step_tokens:,} tokens a step, "
        f"max_model_len {runner.max_model_len:,}, prefix caching {'on' if config.prefix_caching else 'off'}"
    )


def prompt_line(tokenizer: Tokenizer, template_file: str | None = None) -> str:
    """How text becomes a prompt: BOS, end of sequence, chat template."""
    bos = f"BOS {tokenizer.special_tokens.get('bos_token')!r} is put in front" if tokenizer.add_bos else "no BOS added"
    ends = ", ".join(repr(tokenizer.id_to_text(token)) for token in tokenizer.eos_token_ids) or "nothing"
    template = "no chat template"
    if tokenizer.template_hash is not None:
        template = f"chat template {tokenizer.template_hash} from {template_file or 'the model'}"
    return f"prompts: {bos}; answers end with {ends}; {template}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready."""

    engine: Engine
    tokenizer: Tokenizer
    config: EngineConfig
    """With the defaults of the device."""
    report: list[str]


def load(config: EngineConfig) -> Loaded:
    """Find the model, read it, size the KV cache, join the parts. Raises `ModelError`, `ParameterError`."""
    phases = Phases()
    template = _template(config)
    with phases("find the model"):
        from liushui import loading

        checkpoint = loading.open_checkpoint(loading.resolve(config.model))
    with phases("tokenizer"):
        tokenizer = Tokenizer.from_checkpoint(checkpoint, template)
    config, runner = _runner(config, checkpoint, phases)
    suggested = Suggestions.read(checkpoint.generation_config)
    engine = join(config, runner, tokenizer, suggested.checked() if config.generation_config == "auto" else None)
    phases.close()
    return Loaded(engine, tokenizer, config, report(config, checkpoint, tokenizer, runner, phases))


def _runner(config: EngineConfig, checkpoint: Any, phases: Phases) -> tuple[EngineConfig, RunnerFacts]:
    """The settings for the device, and the runner there."""
    from liushui.runner import early

    with early.collector_at_rest():
        with phases("import the runner"):
            from liushui.runner import hardware
            from liushui.runner.runner import Runner, may_be_plain
        if not may_be_plain(config, checkpoint):
            with phases("import torch"):
                early.bring_torch(gpu=config.device != "cpu" and hardware.may_have_gpu())
        config = config.settled(hardware.on_gpu(config.device))
        with phases("weights and KV cache"):
            return config, _with_memory(Runner.load, config, checkpoint)


@dataclass(frozen=True, slots=True)
class TextSide:
    """What a server needs to make prompts and text, without the weights."""

    tokenizer: Tokenizer
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    report: tuple[str, ...] = ()


def load_text(config: EngineConfig) -> TextSide:
    """The tokenizer, the chat template and what the files suggest. Raises as `load`."""
    from liushui import loading

    template = _template(config)
    checkpoint = loading.open_checkpoint(loading.resolve(config.model))
    tokenizer = Tokenizer.from_checkpoint(checkpoint, template)
    suggested = Suggestions.read(checkpoint.generation_config)
    lines = prompt_line(tokenizer, config.chat_template), suggested.line(config.generation_config)
    return TextSide(tokenizer, suggested.checked() if config.generation_config == "auto" else {}, lines)


def make_core(config: EngineConfig, serving: ServingConfig) -> Core:
    """The weights, the KV cache and a scheduler, without any text. Raises as `load`."""
    phases = Phases()
    with phases("find the model"):
        from liushui import loading

        checkpoint = loading.open_checkpoint(loading.resolve(config.model))
    config, runner = _runner(config, checkpoint, phases)
    from liushui.runner.sampler import bring_torch

    bring_torch()
    if (stay_ahead := getattr(runner, "stay_ahead", None)) is not None:
        stay_ahead()
    phases.close()
    lines = [f"{config.model}: {checkpoint.describe()}", *runner.notes, batch_line(config, runner), phases.line()]
    return core_of(config, serving, runner, lines)


def core_of(config: EngineConfig, serving: ServingConfig, runner: RunnerFacts, report: Sequence[str] = ()) -> Core:
    """A scheduler around a runner, for serving."""
    return Core(
        make_scheduler(config, runner, serving.ageing),
        runner,
        runner.vocab_size,
        getattr(runner, "depth", 0),
        House(config.policy, config.seats, runner.num_blocks, runner.block_size),
        tuple(report),
    )


def make_scheduler(
    config: EngineConfig, runner: RunnerFacts, ageing: float | None = None, cache_room: int | None = None
) -> Scheduler:
    return Scheduler(
        BlockPool(runner.num_blocks, runner.block_size, cache_room),
        max_num_seqs=config.seats,
        max_num_batched_tokens=config.step_tokens,
        max_model_len=runner.max_model_len,
        policy=config.policy,
        prefix_caching=config.prefix_caching,
        ageing=ageing,
    )


def join(
    config: EngineConfig,
    runner: RunnerFacts,
    tokenizer: Tokenizer,
    sampling_defaults: Mapping[str, Any] | None = None,
) -> Engine:
    """Scheduler, runner and tokenizer as one engine. `sampling_defaults`: for what requests leave open.

    Its prefix cache is frugal with memory (`KVPlan.cache_room`); a server's, for which the memory is there to be used
    by whoever comes back, is not.
    """
    scheduler = make_scheduler(config, runner, cache_room=getattr(runner, "cache_room", None))
    depth = getattr(runner, "depth", 0)
    return Engine(
        config,
        scheduler,
        runner,
        tokenizer,
        vocab_size=runner.vocab_size,
        depth=depth,
        sampling_defaults=sampling_defaults,
    )


def _with_memory(read: Callable[[EngineConfig, Any], T], config: EngineConfig, checkpoint: Any) -> T:
    """`read`, and what to do where the memory does not suffice for it."""
    try:
        return read(config, checkpoint)
    except (MemoryError, RuntimeError) as error:  # torch raises the second, with these words
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        raise CapacityError(
            "max_num_batched_tokens",
            f"there is not enough memory for the weights, the KV cache and steps of {config.step_tokens:,} tokens; "
            "lower it, max_num_seqs or kv_cache_gib, or choose a smaller model",
        ) from None


def _template(config: EngineConfig) -> str | None:
    """The chat template that the settings name."""
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError("chat_template", f"cannot be read: {error}") from None
