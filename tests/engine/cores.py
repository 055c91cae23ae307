"""Cores for engine processes: a scripted model that takes its time, and one that does not load."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from liushui.config import EngineConfig, ServingConfig
from liushui.core.plan import NewSequence, StepPlan
from liushui.engine.attendant import Core
from liushui.engine.startup import TextSide, core_of
from liushui.errors import CapacityError
from tests.engine.scripted import VOCAB_SIZE, Done, ScriptedExecutor, noise, tiny_tokenizer

POISON = 300
"""A first prompt token that kills whoever computes it."""


@dataclass
class SlowExecutor(ScriptedExecutor):
    """A scripted executor with the sizes of a runner, whose steps take as long as a file says."""

    seconds: float = 0.0
    num_blocks: int = 64
    block_size: int = 4
    max_model_len: int = 128
    vocab_size: int = VOCAB_SIZE

    def execute(self, plan: StepPlan) -> Done:
        time.sleep(self.seconds)
        return super().execute(plan)


def poisonous(new: NewSequence, position: int) -> int:
    if new.prompt_token_ids[0] == POISON:
        os._exit(7)
    return noise(new, position)


def make(config: EngineConfig, serving: ServingConfig, **sizes: float) -> Core:
    return core_of(config, serving, SlowExecutor(poisonous, **sizes))  # type: ignore[arg-type]


def make_slow(config: EngineConfig, serving: ServingConfig) -> Core:
    return make(config, serving, seconds=0.01)


class Steps:
    """Holds the steps of an engine, in this process or in another, and lets them through by number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.let(0)

    def let(self, number: int) -> None:
        """The first `number` steps may run, and no more."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(str(number))
        fresh.replace(self._path)

    def open(self) -> None:
        self.let(1 << 60)


def make_gated(config: EngineConfig, serving: ServingConfig) -> Core:
    """Its steps wait for `Steps`; the file is named in place of the model."""

    def wait(plan: StepPlan) -> None:
        while plan.step_id >= int(Path(config.model).read_text()):
            time.sleep(0.001)

    core = make(config, serving)
    core.executor.on_step = wait  # type: ignore[attr-defined]
    return core


def make_stuck(config: EngineConfig, serving: ServingConfig) -> Core:
    """The first step never comes back."""
    return make(config, serving, seconds=1000.0)


def make_computing(config: EngineConfig, serving: ServingConfig) -> Core:
    """The first step computes for two seconds."""

    def compute(plan: StepPlan) -> None:
        while plan.step_id == 0 and time.process_time() < end:
            sum(range(10_000))

    core = make(config, serving)
    end = time.process_time() + 2.0
    core.executor.on_step = compute  # type: ignore[attr-defined]
    return core


def hang(config: EngineConfig, serving: ServingConfig) -> Core:
    """Never loads."""
    time.sleep(1000.0)
    raise AssertionError


def refuse(config: EngineConfig, serving: ServingConfig) -> Core:
    raise CapacityError("kv_cache_gib", "is too much")


def text() -> TextSide:
    return TextSide(tiny_tokenizer())
