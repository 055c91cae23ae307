"""An engine without a model: an executor that follows a script, and checks that plans make sense."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from liushui.config import EngineConfig
from liushui.core.blocks import BlockPool
from liushui.core.plan import NewSequence, StepPlan, StepResult, TokenLogprobs
from liushui.core.request import SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.engine.engine import Engine
from liushui.engine.llm import LLM
from liushui.engine.outputs import RequestOutput
from liushui.engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import byte_level

RAW = byte_level()
EOS = RAW.token_to_id("<|eos|>")
BOS = RAW.token_to_id("<|bos|>")
VOCAB_SIZE = RAW.get_vocab_size()


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = False, template: str | None = TEMPLATE) -> Tokenizer:
    special = {"bos_token": "<|bos|>", "bos_token_id": BOS, "eos_token_ids": [EOS], "add_bos": add_bos}
    return Tokenizer(RAW, special, template)


def noise(new: NewSequence, position: int) -> int:
    """A token for each (prompt, seed, position): mostly letters, so that texts are readable."""
    return 2 + crc32(f"{new.prompt_token_ids}{new.seed}{position}".encode()) % (VOCAB_SIZE - 2)


def saying(text: str, *, then: int = EOS) -> Callable[[NewSequence, int], int]:
    """The model says `text` to everybody, byte by byte, then `then` for ever."""
    ids = [RAW.token_to_id(char) for char in bytes_as_tokens(text)]
    return lambda new, n: ids[n] if n < len(ids) else then


def bytes_as_tokens(text: str) -> list[str]:
    """One single-byte token per UTF-8 byte."""
    from liushui.engine.text import _BYTE_OF_CHAR

    char_of = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    return [char_of[byte] for byte in text.encode()]


@dataclass
class Done:
    value: StepResult | BaseException
    alone: bool = False

    def result(self) -> StepResult:
        value = self.value
        if isinstance(value, BaseException):
            if not isinstance(value, Exception):  # an interrupt comes once
                self.value = StepResult({})
            raise value
        return value


@dataclass
class ScriptedExecutor:
    """`model(sequence, n)` is output token n. Refuses plans that feed anything but the sequence's own tokens."""

    model: Callable[[NewSequence, int], int] = noise
    fail_step: dict[int, BaseException] = field(default_factory=dict)
    """step -> what its result raises."""
    fail_start: dict[int, BaseException] = field(default_factory=dict)
    """step -> what starting it raises."""
    fail_row: Callable[[NewSequence, int], str | None] = lambda new, n: None
    drop_row: Callable[[NewSequence, int], bool] = lambda new, n: False
    known: dict[str, tuple[NewSequence, list[int]]] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    on_step: Callable[[StepPlan], None] = lambda plan: None
    alone: bool = False
    """Its steps are to be read before the next one is launched."""

    def execute(self, plan: StepPlan) -> Done:
        self.plans.append(plan)
        for seq_id in plan.dropped:
            self.known.pop(seq_id, None)
        for new in plan.new:
            self.known[new.seq_id] = (new, list(new.prompt_token_ids))
        self.on_step(plan)
        if (error := self.fail_start.get(plan.step_id)) is not None:
            raise error
        if (error := self.fail_step.get(plan.step_id)) is not None:
            return Done(error)
        tokens: dict[str, list[int]] = {}
        errors: dict[str, str] = {}
        logprobs: dict[str, list[TokenLogprobs]] = {}
        prompt_logprobs: dict[str, list[tuple[int, TokenLogprobs]]] = {}
        for item in plan.items:
            new, ids = self.known[item.seq_id]
            fed = ids[item.start : item.start + item.num_tokens]
            assert len(fed) == item.num_tokens, (item, ids)
            assert list(item.token_ids) == fed[: len(item.token_ids)], (item, ids)
            if new.sampling.prompt_logprobs is not None:
                last = min(item.start + item.num_tokens, len(new.prompt_token_ids) - 1)
                prompt_logprobs[item.seq_id] = [
                    (p + 1, logprob(new.prompt_token_ids[p + 1], new.sampling.prompt_logprobs))
                    for p in range(item.start, last)
                ]
            if not item.samples:
                continue
            n = len(ids) - len(new.prompt_token_ids)
            if (message := self.fail_row(new, n)) is not None:
                errors[item.seq_id] = message
                ids.append(0)
                continue
            token = self.model(new, n)
            if not self.drop_row(new, n):
                tokens[item.seq_id] = [token]
            ids.append(token)
            if new.sampling.logprobs is not None:
                logprobs[item.seq_id] = [logprob(token, new.sampling.logprobs)]
        return Done(StepResult(tokens, logprobs, prompt_logprobs, errors), self.alone)


def logprob(token: int, top: int) -> TokenLogprobs:
    """The chosen token is always the second most likely, at -2; the others are 10, 11, ... at -1, -3, ..."""
    others = [10 + i for i in range(top)]
    best = [(other, -1.0 - 2 * rank) for rank, other in enumerate(others)]
    return TokenLogprobs(token, -2.0, 2, tuple(best))


class Clock:
    """Every look at it is a millisecond later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def make_engine(
    executor: ScriptedExecutor | None = None,
    *,
    depth: int = 0,
    num_blocks: int = 64,
    max_model_len: int = 128,
    tokenizer: Tokenizer | None = None,
    log_limit: int | None = None,
    sampling_defaults: dict[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "seed": 1} | settings
    config = EngineConfig(**settings).validate()
    scheduler = Scheduler(
        BlockPool(num_blocks, config.block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        policy=config.policy,
        prefix_caching=config.prefix_caching,
    )
    return Engine(
        config,
        scheduler,
        executor or ScriptedExecutor(),
        tokenizer or tiny_tokenizer(),
        Clock(),
        vocab_size=VOCAB_SIZE,
        depth=depth,
        log_limit=log_limit,
        sampling_defaults=sampling_defaults,
    )


def make_llm(executor: ScriptedExecutor | None = None, **settings: Any) -> LLM:
    engine = make_engine(executor, **settings)
    config = EngineConfig(max_num_seqs=settings.get("max_num_seqs", 4))
    return LLM.from_engine(engine, tiny_tokenizer(), config)


def run_all(engine: Engine) -> tuple[dict[str, Any], list[Any]]:
    """Step until nothing is left: (outputs by request id, all deltas)."""
    outputs, deltas = {}, []
    for _ in range(10_000):
        if not engine.has_unfinished:
            return outputs, deltas
        for output in engine.step():
            if hasattr(output, "outputs"):
                assert output.request_id not in outputs
                outputs[output.request_id] = output
            else:
                deltas.append(output)
    raise AssertionError("the engine does not come to an end")


def assert_clean(engine: Engine) -> None:
    """Nothing is left: no request, no step in flight, no block owned."""
    engine.scheduler.check()
    assert not engine.has_unfinished
    assert not engine.scheduler.has_work
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert not engine._answers


def one(prompt: Any, params: SamplingParams, executor: ScriptedExecutor | None = None, **keys: Any) -> RequestOutput:
    engine = make_engine(executor, **keys)
    request_id = engine.add_request(prompt, params)
    outputs, _ = run_all(engine)
    assert_clean(engine)
    return outputs[request_id]
