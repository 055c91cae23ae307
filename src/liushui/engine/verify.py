"""Is an answer a pure function of its request, on this machine and with this model? Tried in every way it is served.

Each of a set of requests (prompts x sampling parameters) is first answered by itself, its prompt fed whole and nothing
cached. Then all are answered again in company: batched, in chunks, preempted, from the prefix cache, in static groups.
Tokens, texts and log-probabilities must be the same to the bit. All ways share one loaded model; each has a scheduler
and an engine of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, cast

from liushui.config import EngineConfig
from liushui.core.blocks import BlockPool
from liushui.core.cost import Pace
from liushui.core.plan import StepPlan
from liushui.core.request import SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.engine.engine import Engine
from liushui.engine.llm import LLM
from liushui.engine.outputs import RequestOutput, TokenLogprob
from liushui.engine.startup import RunnerFacts
from liushui.errors import LiushuiError, ParameterError

SEATS = 4
"""Fewest sequences a batch must hold for company to mean anything."""

TEXTS = (
    "The",
    "流水席上,客人随到随坐,吃完就走。",
    "A banquet where nobody waits: guests sit down when they arrive and leave when they are done. " * 4,
    "Once upon a time there was a",
    "A banquet where nobody waits: guests sit down when they arrive and leave when they are done. " * 4 + "So",
    "def fibonacci(n):\n    ",
)
"""From one token to several KV blocks; two begin alike."""

CASES: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, logprobs=2),
    "temperature": SamplingParams(temperature=0.8, seed=1, logprobs=1),
    "top-p/k, min-p": SamplingParams(temperature=1.1, top_p=0.9, top_k=40, min_p=0.01, seed=2, logprobs=0),
    "penalties": SamplingParams(
        temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4, logit_bias={7: 1.5},
        min_tokens=3, seed=3, logprobs=1,
    ),
    "n = 2": SamplingParams(temperature=1.0, n=2, seed=4, logprobs=0),
    "prompt logprobs": SamplingParams(temperature=0, logprobs=0, prompt_logprobs=1),
}  # fmt: skip


class Impatient(Scheduler):
    """Throws one sequence out of the batch at every second step, each twice at most."""

    def schedule(self, now: float = 0.0, pace: Pace | None = None) -> StepPlan | None:
        fresh = [seq for seq in self._running if seq.num_preemptions < 2]
        if self._next_step % 2 and fresh:
            self._preempt(fresh[-1])
        return super().schedule(now, pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to serve the requests."""

    name: str
    policy: str = "continuous"
    seats: int | None = None
    """Sequences in a batch; None: as the engine was loaded."""
    budget: int | None = None
    """Tokens in a step; None: as the engine was loaded."""
    cached: bool = False
    """Answer everything twice and judge the second time: prompts come from the prefix cache."""
    preempted: bool = False
    one_by_one: bool = False
    backwards: bool = False
    """Last request first."""
    proof: str = "batch"
    """What must have happened for the verdict to count: batch, chunks, preemptions or cached tokens."""


ALONE = Way(name="alone", one_by_one=True, proof="")
WAYS = (
    Way(name="alone, again", one_by_one=True, proof=""),
    Way(name="batched"),
    Way(name="batched, last first", backwards=True),
    Way(name="queued", seats=2),
    Way(name="chunked", seats=SEATS, budget=7, proof="chunks"),
    Way(name="preempted", preempted=True, proof="preemptions"),
    Way(name="prefix-cached", cached=True, proof="cached tokens"),
    Way(name="static", policy="static", seats=SEATS),
    Way(name="static, chunked", policy="static", seats=SEATS, budget=7, proof="chunks"),
    Way(
        name="all at once", seats=SEATS, budget=7, preempted=True, cached=True, backwards=True,
        proof="preemptions",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer first left that of the request alone."""

    request: int
    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"request {self.request}, {self.where}: {self.got} instead of {self.expected}"


@dataclass(slots=True)
class Verdict:
    """What became of one way."""

    way: str
    policy: str = "continuous"
    cases: dict[str, Difference | None] = field(default_factory=dict)
    """Sampling parameters -> the first difference; None: the same bits."""
    happened: dict[str, int] = field(default_factory=dict)
    """steps, batch (sequences in the widest step), chunks, preemptions, cached tokens."""
    missing: str = ""
    """What should have happened and did not: then the verdict says nothing, and counts as failed."""

    @property
    def passed(self) -> bool:
        return not self.missing and all(difference is None for difference in self.cases.values())


@dataclass(frozen=True, slots=True)
class Subject:
    """One request of the matrix."""

    case: str
    ids: tuple[int, ...]
    params: SamplingParams


def subjects(llm: LLM, max_tokens: int) -> list[Subject]:
    """Each set of parameters with two prompts, cut to what the model's context holds."""
    room = llm.engine.inputs.limits.longest - max_tokens
    if room < 1:
        raise ParameterError("max_tokens", f"{max_tokens} leave no room for a prompt; lower it")
    prompts = [tuple(llm.tokenizer.encode(text)[:room]) for text in TEXTS]
    made = []
    for number, (name, params) in enumerate(CASES.items()):
        params = replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))
        pair = prompts[number % len(prompts)], prompts[(number + 2) % len(prompts)]
        made += [Subject(name, prompt, params) for prompt in pair]
    return made


def verify(llm: LLM, *, max_tokens: int = 16, ways: Seq[Way] = WAYS) -> Iterator[Verdict]:
    """The matrix, one way at a time as it is done. `llm` must be new: its KV memory is written over.

    Raises `ParameterError` if it was loaded for fewer than four sequences or eight tokens a step, `LiushuiError` if it
    has answered already (its prefix cache would name what is gone).
    """
    config, scheduler = llm.config, llm.engine.scheduler
    if scheduler.has_work or scheduler.pool.num_cached:
        raise LiushuiError("verify needs a model that has not answered yet: load another LLM")
    if config.seats < SEATS or config.step_tokens < 2 * SEATS:
        raise ParameterError("max_num_seqs", f"must be at least {SEATS} to verify batches, got {config.seats}")
    todo = subjects(llm, max_tokens)
    expected, _ = answer(llm, todo, ALONE, "reference")
    for number, way in enumerate(ways):
        outputs, happened = answer(llm, todo, way, f"way{number}")
        verdict = Verdict(way.name, way.policy, dict.fromkeys(CASES), happened)
        if way.proof and happened[way.proof] < (2 if way.proof == "batch" else 1):
            verdict.missing = way.proof
        for index, (subject, right, output) in enumerate(zip(todo, expected, outputs, strict=True)):
            if verdict.cases[subject.case] is None:
                verdict.cases[subject.case] = difference(index, right, output)
        yield verdict


def answer(llm: LLM, todo: Seq[Subject], way: Way, name: str) -> tuple[list[RequestOutput], dict[str, int]]:
    """Outputs in the order of `todo`, and what happened. `name`: request ids must be new to the executor."""
    engine = engine_for(llm, way)
    for turn in range(1 + way.cached):
        order = list(enumerate(todo))[:: -1 if way.backwards else 1]
        batches = [[item] for item in order] if way.one_by_one else [order]
        outputs: dict[int, RequestOutput] = {}
        for batch in batches:
            for index, subject in batch:
                request_id = f"verify-{name}-{turn}-{index}"
                engine.add_request(list(subject.ids), subject.params, index=index, request_id=request_id)
            outputs.update((output.index, output) for output in _finish(engine))
    steps = engine.log.steps
    happened = {
        "steps": len(steps),
        "batch": max(len(step.items) for step in steps),
        "chunks": sum(not item.samples for step in steps for item in step.items),
        "preemptions": engine.scheduler.num_preemptions,
        "cached tokens": engine.scheduler.num_hit_tokens,
    }
    return [outputs[index] for index in range(len(todo))], happened


def engine_for(llm: LLM, way: Way) -> Engine:
    """A new scheduler and engine around the loaded model."""
    runner = cast(RunnerFacts, llm.engine.executor)
    config: EngineConfig = llm.config
    kind = Impatient if way.preempted else Scheduler
    scheduler = kind(
        BlockPool(runner.num_blocks, runner.block_size),
        max_num_seqs=1 if way.one_by_one else min(way.seats or config.seats, config.seats),
        max_num_batched_tokens=min(way.budget or config.step_tokens, config.step_tokens),
        max_model_len=runner.max_model_len,
        policy="static" if way.policy == "static" else "continuous",
        prefix_caching=way.cached,
    )
    return Engine(config, scheduler, runner, llm.tokenizer, vocab_size=runner.vocab_size, depth=llm.engine.depth)


def _finish(engine: Engine) -> Iterator[RequestOutput]:
    while engine.has_unfinished:
        for output in engine.step():
            if isinstance(output, RequestOutput):
                yield output


# -- bits


def difference(index: int, expected: RequestOutput, got: RequestOutput) -> Difference | None:
    """The first place where two outputs are not the same to the bit; None if they are."""
    for (where, right), (_, found) in zip_longest(facts(expected), facts(got), fillvalue=("the end", "nothing")):
        if right != found:
            return Difference(index, where, right, found)
    return None


def facts(output: RequestOutput) -> Iterator[tuple[str, str]]:
    """(where, what) of everything an answer is made of; floats in hexadecimal, which is exact."""
    if output.error is not None:
        yield "error", output.error
    yield from _logprobs("prompt", output.prompt_logprobs or ())
    for made in output.outputs:
        for position, token in enumerate(made.token_ids):
            yield f"answer {made.index} token {position}", str(token)
        yield from _logprobs(f"answer {made.index}", made.logprobs or ())
        yield f"answer {made.index} end", f"{made.finish_reason}, {made.stop_reason!r}, {made.text!r}"


def _logprobs(name: str, entries: Iterable[TokenLogprob | None]) -> Iterator[tuple[str, str]]:
    for position, entry in enumerate(entries):
        for token, found in (entry or {}).items():
            where = f"{name} log-probability {position}"
            yield where, f"{token}: {found.logprob!r} (rank {found.rank}, {found.logprob.hex()})"


def report(verdicts: Seq[Verdict], describe: Callable[[], Seq[str]]) -> dict[str, Any]:
    """The matrix for machines."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "startup": list(describe()),
        "ways": [
            {
                "way": verdict.way,
                "policy": verdict.policy,
                "passed": verdict.passed,
                "cases": {
                    case: {"bitwise": found is None, "difference": None if found is None else str(found)}
                    for case, found in verdict.cases.items()
                },
                "happened": verdict.happened,
                "missing": verdict.missing or None,
            }
            for verdict in verdicts
        ],
    }
