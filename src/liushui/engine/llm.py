"""`LLM`: the engine as a Python object. Prompts in, outputs out."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.engine.ahead import Ahead, Direct, NotYet, Supply
from liushui.engine.engine import Engine, EngineOutput
from liushui.engine.events import EventLog
from liushui.engine.inputs import Prepared, Prompt, with_index
from liushui.engine.interrupts import deferred_interrupt
from liushui.engine.live import refused
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.progress import Progress
from liushui.engine.score import SCORING, Score, score_pairs, scored
from liushui.engine.startup import load
from liushui.engine.tokenizer import Tokenizer
from liushui.errors import LiushuiError, ParameterError

Params = SamplingParams | Seq[SamplingParams] | None
Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}"""
_WINDOW = 2
"""Prompts are taken from their iterator until this many times `max_num_seqs` sequences wait."""


class LLM:
    """A model, ready to answer. Several calls, also from several threads, share its batch.

    llm = LLM("smollm2", max_num_seqs=16)                   # settings: see EngineConfig
    llm.generate(["Hello", "你好"], SamplingParams(max_tokens=20))
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **settings: Any) -> None:
        """Load `model` (alias, Hugging Face name, folder or GGUF file). Raises `ParameterError` for a setting that
        is unknown or cannot be honoured, `ModelError` for a model that cannot be read."""
        config = _config(model, config, settings)
        loaded = load(config)
        self._init(loaded.engine, loaded.tokenizer, loaded.config, loaded.report)

    @classmethod
    def from_engine(
        cls, engine: Engine, tokenizer: Tokenizer, config: EngineConfig, report: Iterable[str] = ()
    ) -> "LLM":
        """Around an engine that exists, with any executor: for tests, simulation and other front ends."""
        llm = cls.__new__(cls)
        llm._init(engine, tokenizer, config, list(report))
        return llm

    def _init(self, engine: Engine, tokenizer: Tokenizer, config: EngineConfig, report: list[str]) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.unclaimed: deque[EngineOutput] = deque()
        """What became of requests that were given to `engine` directly, while calls here drove it."""
        self._report = report
        self._mail: dict[str, deque[EngineOutput]] = {}
        self._lock = threading.RLock()

    # -- text in, text out

    def generate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Answer all prompts; outputs in the order of the input.

        `prompts`: text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of these and of lists of token ids.
        `sampling_params`: one for all, or one for each. Nothing starts before all are checked: `ParameterError`
        names the prompt and the field. What goes wrong later is in that output's `error` and hurts no other.
        """
        single = isinstance(prompts, str | Mapping)
        items: list[Prompt] = [prompts] if single else _as_list(prompts)  # type: ignore[list-item]
        now = self.engine.clock()
        prepared = []
        for index, (prompt, params) in enumerate(_paired(items, sampling_params)):
            try:
                prepared.append(self._prepare(prompt, params, index=index, now=now))
            except ParameterError as error:
                raise (error if single else with_index(error, index)) from None
        return self._collect(prepared, use_tqdm)

    def generate_iter(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        read_ahead: bool = True,
    ) -> Iterator[RequestOutput]:
        """Answer prompts as they come, outputs as they finish; `.index` is the position in the input.

        `prompts` may be lazy and endless: it is read only as far ahead as the batch needs. A prompt that is refused
        gives an output with `.error`. If `prompts` itself raises, what was accepted is finished first. Closing the
        iterator aborts what is unfinished.

        What is not a list is read on a thread of its own: while it keeps its reader waiting, those it has given are
        answered. `read_ahead` False: it is read by the caller, who then waits for it with all the others.
        """
        items: Iterable[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else prompts
        checked = self._checked(_paired(items, sampling_params))
        at_hand = all(isinstance(part, Seq | SamplingParams | None) for part in (items, sampling_params))
        for output in self._run(Ahead(checked) if read_ahead and not at_hand else Direct(checked)):
            if isinstance(output, RequestOutput):
                yield output

    def generate_stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamDelta]:
        """One prompt's text as it comes; closing the iterator aborts it. Raises `ParameterError`."""
        return self._deltas(self._prepare(prompt, sampling_params, stream=True))

    # -- conversations

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: Params = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's chat template."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        now = self.engine.clock()
        prepared = []
        for index, (conversation, params) in enumerate(_paired(conversations, sampling_params)):
            try:
                prepared.append(
                    self._prepare_chat(
                        conversation, params, add_generation_prompt, chat_template_kwargs, index=index, now=now
                    )
                )
            except ParameterError as error:
                raise (error if single else with_index(error, index)) from None
        return self._collect(prepared, use_tqdm)

    def chat_stream(
        self,
        messages: Seq[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[StreamDelta]:
        """One conversation's answer as it comes; closing the iterator aborts it."""
        return self._deltas(
            self._prepare_chat(messages, sampling_params, add_generation_prompt, chat_template_kwargs, stream=True)
        )

    # -- how likely a text is

    def score(
        self, contexts: Prompt | Seq[Prompt], continuations: Prompt | Seq[Prompt], *, use_tqdm: bool = True
    ) -> list[Score]:
        """Log-likelihood of each continuation after its context, in the order of the input.

        One context for several continuations, or one each; texts or lists of token ids. A context that is empty counts
        as the beginning of a document. Contexts that begin alike are computed once (the prefix cache). Raises
        `ParameterError` naming the pair; what goes wrong later is in that score's `error`.
        """
        pairs = score_pairs(contexts, continuations, self.tokenizer)
        now, prepared = self.engine.clock(), []
        for index, (context, continuation) in enumerate(pairs):
            try:
                where = {"index": index, "now": now, "prompt_logprobs_from": len(context)}
                prepared.append(self._prepare([*context, *continuation], SCORING, **where))
            except ParameterError as error:
                raise with_index(error, index) from None
        outputs = self._collect(prepared, use_tqdm)
        return [scored(output, len(context)) for output, (context, _) in zip(outputs, pairs, strict=True)]

    # -- what happened

    def startup_report(self) -> list[str]:
        """What was loaded, how it will be run, and where the time went; one fact a line."""
        return list(self._report)

    def timeline(self) -> EventLog:
        """The event log since the start: who sat in which batch at which step."""
        return self.engine.log

    # -- inside

    def _prepare(self, prompt: Prompt, params: SamplingParams | None, **where: Any) -> Prepared:
        with self._lock:
            return self.engine.prepare(prompt, params, **where)

    def _prepare_chat(
        self,
        messages: Seq[Message],
        params: SamplingParams | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any] | None,
        **where: Any,
    ) -> Prepared:
        text, ids = self.tokenizer.chat(
            messages, add_generation_prompt=add_generation_prompt, template_kwargs=dict(kwargs or {})
        )
        return self._prepare(ids, params, prompt_text=text, **where)

    def _checked(self, pairs: Iterable[tuple[Prompt, SamplingParams | None]]) -> Iterator[Prepared | RequestOutput]:
        for index, (prompt, params) in enumerate(pairs):
            try:
                yield self._prepare(prompt, params, index=index)
            except LiushuiError as error:
                with self._lock:
                    request_id = self.engine.inputs.new_id()
                yield refused(error, request_id=request_id, index=index, prompt=prompt)

    def _collect(self, prepared: list[Prepared], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        with Progress(self.engine, len(prepared), show=use_tqdm) as progress:
            after_step = (lambda: progress.update(self.engine, len(outputs))) if progress.shown else None
            for output in self._run(Direct(iter(prepared)), after_step):
                if isinstance(output, RequestOutput):
                    outputs[output.index] = output
                    progress.update(self.engine, len(outputs))
        return [outputs[item.index] for item in prepared]

    def _deltas(self, prepared: Prepared) -> Iterator[StreamDelta]:
        for output in self._run(Direct(iter([prepared]))):
            if isinstance(output, StreamDelta):
                yield output

    def _run(
        self, source: Supply[Prepared | RequestOutput], after_step: Callable[[], None] | None = None
    ) -> Iterator[EngineOutput]:
        """Drive the engine until all that `source` gives has ended; what other calls wait for goes to their box."""
        box: deque[EngineOutput] = deque()
        mine: set[str] = set()
        more = True
        failure: Exception | None = None
        window = _WINDOW * self.config.seats
        try:
            while more or mine or box:
                while more and len(box) < window and self.engine.scheduler.num_waiting < window:
                    try:
                        self._accept(source.take(wait=not mine and not box), box, mine)
                    except NotYet:
                        break
                    except StopIteration:
                        more = False
                    except Exception as error:
                        more, failure = False, error
                while box:
                    output = box.popleft()
                    if isinstance(output, RequestOutput):
                        mine.discard(output.request_id)
                    yield output
                if mine or more:
                    self._step(box, more, after_step)
            if failure is not None:
                raise failure
        finally:
            source.close()
            self._leave(mine)

    def _accept(self, item: Prepared | RequestOutput, box: deque[EngineOutput], mine: set[str]) -> None:
        if isinstance(item, RequestOutput):
            box.append(item)
            return
        request_id = item.request.request_id
        try:
            with self._lock, deferred_interrupt():
                self._mail[request_id] = box
                mine.add(request_id)
                self.engine.submit(item)
        except LiushuiError as error:
            self._mail.pop(request_id, None)
            mine.discard(request_id)
            box.append(refused(error, request_id=request_id, index=item.index, prompt=item.prompt))

    def _step(self, box: deque[EngineOutput], once: bool, after_step: Callable[[], None] | None) -> None:
        """One step, or as many as it takes until there is something in `box`: Ctrl-C is deferred once for all of them,
        since code that no cache holds between two steps makes them wait."""
        with deferred_interrupt() as interrupt:
            while True:
                with self._lock:
                    for output in self.engine.step():
                        self._mail.get(output.request_id, self.unclaimed).append(output)
                        if isinstance(output, RequestOutput):
                            self._mail.pop(output.request_id, None)
                if after_step is not None:
                    after_step()
                if once or box or interrupt.asked:
                    return

    def _leave(self, unfinished: set[str]) -> None:
        """End what a call leaves behind, and do not leave a step in flight that nobody waits for."""
        with self._lock:
            for request_id in sorted(unfinished):
                self.engine.abort(request_id)
                self._mail.pop(request_id, None)
            if not self.engine.num_unfinished:
                self.engine.drain()


def _config(model: str | None, config: EngineConfig | None, settings: dict[str, Any]) -> EngineConfig:
    for name in settings:
        if name not in EngineConfig.names():
            near = get_close_matches(name, EngineConfig.names(), n=1)
            raise ParameterError(name, "is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    if model is not None:
        settings = {"model": model, **settings}
    return replace(config or EngineConfig(), **settings).validate()


def _as_list(prompts: Any) -> list[Prompt]:
    if not isinstance(prompts, Iterable):
        raise ParameterError("prompts", f"must be a prompt or a list of prompts, got {type(prompts).__name__}")
    items = list(prompts)
    if items and isinstance(items[0], int) and not isinstance(items[0], bool):
        raise ParameterError("prompts", "is a list of integers; for one prompt of token ids give [[...]]")
    return items


def _paired(prompts: Iterable[Any], params: Any) -> Iterator[tuple[Any, SamplingParams | None]]:
    """Each prompt with its parameters. Raises `ParameterError` if one of the two ends before the other."""
    if params is None or isinstance(params, SamplingParams):
        for prompt in prompts:
            yield prompt, params
        return
    if isinstance(prompts, list) and isinstance(params, Seq) and len(prompts) != len(params):
        raise ParameterError("sampling_params", f"{len(params):,} given for {len(prompts):,} prompts")
    if not isinstance(params, Iterable):
        raise ParameterError("sampling_params", f"must be SamplingParams or a list, got {type(params).__name__}")
    try:
        yield from zip(prompts, params, strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ParameterError("sampling_params", "must be one, or exactly one per prompt") from None
