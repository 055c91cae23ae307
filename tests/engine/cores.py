"""Cores for engine processes: a scripted model that takes its time, and one that does not load."""

import os
import time
from dataclasses import dataclass

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


def make_stuck(config: EngineConfig, serving: ServingConfig) -> Core:
    """The first step never comes back."""
    return make(config, serving, seconds=1000.0)


def refuse(config: EngineConfig, serving: ServingConfig) -> Core:
    raise CapacityError("kv_cache_gib", "is too much")


def text() -> TextSide:
    return TextSide(tiny_tokenizer())
