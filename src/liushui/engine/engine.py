"""The loop: schedule, execute, update.

    depth 0      plan 1 | run 1 | learn 1 | plan 2 | run 2 | learn 2 | ...
    depth 1      plan 1 | run 1 ......... | run 2 ......... | run 3 ...
                        plan 2 | learn 1 |  plan 3 | learn 2 |

It is one loop: `step` plans and starts a step, and takes in the oldest one when more than `depth` are in flight.

What goes wrong stays where it is: a row that the executor gives up, a text that cannot be decoded, a whole step that
raises. The sequences concerned end with `FinishReason.ERROR` and a message, all others go on. Not thread-safe.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

from liushui.config import EngineConfig
from liushui.core.plan import Event, Executor, Pending, StepPlan, StepResult, TokensEvent
from liushui.core.request import FinishReason, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.engine.events import EventLog, House, Kind, SequenceEvent
from liushui.engine.inputs import InputProcessor, Limits, Prepared, Prompt, PromptEncoder
from liushui.engine.live import LiveAnswer, LiveRequest
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.text import RawTokenizer, Vocabulary
from liushui.errors import LiushuiError, ParameterError

EngineOutput = StreamDelta | RequestOutput


class EngineTokenizer(PromptEncoder, Protocol):
    """What the engine needs of a model's tokenizer."""

    @property
    def raw(self) -> RawTokenizer: ...

    @property
    def eos_token_ids(self) -> Seq[int]: ...

    @property
    def bos_token_id(self) -> int | None: ...


class Flight(NamedTuple):
    """A step under way, and how full the house was when it was planned."""

    plan: StepPlan
    pending: Pending
    start: float
    waiting: int
    running: int
    free_blocks: int


class Failed(NamedTuple):
    """A step that could not even be started."""

    error: BaseException

    def result(self) -> StepResult:
        if isinstance(self.error, Exception):
            raise self.error
        raise RuntimeError(f"interrupted: {describe(self.error)}")


class Engine:
    """Requests in, deltas and outputs out, one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: EngineTokenizer,
        clock: Callable[[], float] = time.monotonic,
        *,
        vocab_size: int,
        depth: int = 0,
        log_limit: int | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`clock`: seconds, monotonic. `vocab_size`: token ids the model knows. `depth`: steps kept in flight while
        the next one is planned. `log_limit`: events and steps the log keeps; None: all.
        `sampling_defaults`: fields of SamplingParams for requests that leave them open."""
        pool = scheduler.pool
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.depth = depth
        self.vocab = Vocabulary(tokenizer.raw)
        self.inputs = InputProcessor(
            tokenizer,
            # The last token of an answer is never fed, so it needs no block.
            Limits(scheduler.max_model_len, pool.num_blocks * pool.block_size + 1, vocab_size),
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            truncation_side=config.truncation_side,
            seed=config.seed,
            sampling_defaults=sampling_defaults,
        )
        house = House(config.policy, config.seats, pool.num_blocks, pool.block_size)
        self.log = EventLog(house, limit=log_limit)
        self.num_output_tokens = 0
        """Of all answers since the start."""
        self._requests: dict[str, LiveRequest] = {}
        self._answers: dict[str, LiveAnswer] = {}
        self._flights: deque[Flight] = deque()
        self._touched: dict[str, LiveAnswer] = {}
        self._finished: list[RequestOutput] = []
        self._outputs: list[EngineOutput] = []

    # -- in and out

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, **where: Any) -> Prepared:
        """Check a request without accepting it; keywords as in `InputProcessor.prepare`. Raises `ParameterError`."""
        where.setdefault("now", self.clock())
        return self.inputs.prepare(prompt, params, **where)

    def submit(self, prepared: Prepared) -> str:
        """Accept a prepared request: from now on it ends in exactly one `RequestOutput`. Returns its id."""
        request_id = prepared.request.request_id
        if request_id in self._requests:
            raise ParameterError("request_id", f"{request_id!r} is in use; choose another")
        live = LiveRequest(prepared, self.vocab)
        added: list[str] = []
        try:
            for answer in live.answers:
                self.scheduler.add(answer.sequence)
                added.append(answer.sequence.seq_id)
        except Exception:
            for seq_id in added:
                self.scheduler.abort(seq_id)
            raise
        self._requests[request_id] = live
        self._answers.update((answer.sequence.seq_id, answer) for answer in live.answers)
        arrival, num_prompt = prepared.request.arrival_time, len(prepared.request.prompt_token_ids)
        self.log.add(SequenceEvent(Kind.ARRIVED, arrival, request_id, request_id, num_prompt))
        return request_id

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, **where: Any) -> str:
        """Prepare and submit. Raises `ParameterError` naming what cannot be honoured."""
        return self.submit(self.prepare(prompt, params, **where))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its KV blocks return with the last step in flight that names it. Returns what there
        is of it, or None for an id that is unknown or has ended."""
        live = self._requests.get(request_id)
        if live is None:
            return None
        for answer in live.answers:
            if not answer.ended:
                self._cut(answer, FinishReason.ABORT)
                self._touched.pop(answer.sequence.seq_id, None)
        output = next(output for output in self._finished if output.request_id == request_id)
        self._finished.remove(output)
        self._hand_out()
        return output

    def abort_all(self) -> list[RequestOutput]:
        """End everything and wait for the steps in flight: the engine is empty and usable."""
        outputs = [output for request_id in list(self._requests) if (output := self.abort(request_id)) is not None]
        self.drain()
        return outputs

    def drain(self) -> None:
        """Take in every step in flight without planning another."""
        while self._flights:
            self._retire()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to hand out."""
        return bool(self._requests or self._outputs or self._flights)

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished."""
        return len(self._requests)

    # -- the loop

    def step(self) -> list[EngineOutput]:
        """One turn of the loop. Returns new deltas (of streaming requests) and outputs (of finished ones)."""
        now = self.clock()
        plan = self.scheduler.schedule(now)
        if plan is not None:
            self._log_plan(plan, now)
            self._launch(plan)
        if self._flights and (plan is None or len(self._flights) > self.depth):
            self._retire()
        elif plan is None and self._requests:
            self._give_up("the scheduler has nothing to run, though requests wait: a bug, please report it")
        outputs, self._outputs = self._outputs, []
        return outputs

    def _launch(self, plan: StepPlan) -> None:
        """Start the step; if that fails, it is in flight all the same and fails when its turn comes."""
        scheduler, start = self.scheduler, self.clock()
        house = (scheduler.num_waiting, scheduler.num_running, scheduler.pool.num_free)
        try:
            self._flights.append(Flight(plan, self.executor.execute(plan), start, *house))
        except BaseException as error:
            self._flights.append(Flight(plan, Failed(error), start, *house))
            if not isinstance(error, Exception):
                raise

    def _retire(self) -> None:
        """Take in the oldest step: its tokens, its ends, its failures."""
        flight = self._flights[0]
        try:
            result = flight.pending.result()
            errors = _lost(flight.plan, result) | dict(result.errors)
        except Exception as error:
            result = StepResult(tokens={})
            errors = dict.fromkeys((item.seq_id for item in flight.plan.items), describe(error))
        end = self.clock()
        self._flights.popleft()
        self.log.add_step(flight.plan, flight.start, end, flight.waiting, flight.running, flight.free_blocks)
        self._count_step(flight.plan, errors)
        for seq_id, message in errors.items():
            if (live := self._answers.get(seq_id)) is not None and not live.answer.closed:
                self._cut(live, FinishReason.ERROR, message)
        self._take_prompt_logprobs(result)
        self._take(self.scheduler.update(flight.plan, result.tokens), result, end)
        self._hand_out()

    # -- news of a step

    def _take(self, events: Iterable[Event], result: StepResult, now: float) -> None:
        """Hand events to their answers. Ending one may let others go: their events join the queue."""
        queue = deque(events)
        while queue:
            event = queue.popleft()
            live = self._answers.get(event.seq_id)
            if live is None:
                continue
            if not isinstance(event, TokensEvent):
                self._end(live, event.reason, now)
                continue
            try:
                stopped = self._push(live, event.token_ids, result, now)
            except Exception as error:
                self._cut(live, FinishReason.ERROR, f"the text could not be made: {describe(error)}")
                continue
            if stopped:
                queue.extend(self.scheduler.finish(event.seq_id, FinishReason.STOP))

    def _push(self, live: LiveAnswer, tokens: Seq[int], result: StepResult, now: float) -> bool:
        """Give an answer its new tokens. Returns True if a stop string is complete."""
        if live.answer.closed:
            return False
        seq_id = live.sequence.seq_id
        if live.first_token is None:
            live.first_token = now
            self._log(Kind.FIRST_TOKEN, now, live, step_id=live.last_step)
        live.last_token = now
        self.num_output_tokens += len(tokens)
        self._touched[seq_id] = live
        logprobs = result.logprobs.get(seq_id, ())
        for i, token in enumerate(tokens):
            if live.answer.push(token, logprobs[i] if i < len(logprobs) else None):
                return True
        return False

    def _cut(self, live: LiveAnswer, reason: FinishReason, error: str | None = None) -> None:
        """End an answer from outside, now. Under the static policy this may let the rest of its group go."""
        freed = self.scheduler.abort(live.sequence.seq_id, reason)
        self._end(live, reason, self.clock(), error)
        self._take(freed, StepResult(tokens={}), self.clock())

    def _end(self, live: LiveAnswer, reason: FinishReason, now: float, error: str | None = None) -> None:
        """The sequence has left the batch: complete its answer, and with the last one the request."""
        try:
            live.answer.finish(reason)
        except Exception as failure:
            error = f"the text could not be made: {describe(failure)}"
            live.answer.finish(FinishReason.ERROR)
        live.ended = True
        output, request = live.answer.output, live.request
        if error is not None and request.error is None:
            request.error = error
        del self._answers[live.sequence.seq_id]
        self._touched[live.sequence.seq_id] = live
        self._log(
            Kind.FINISHED, now, live, len(output.token_ids), live.last_step, output.finish_reason, live.last_token
        )
        if request.finished:
            del self._requests[request.request.request_id]
            self._finished.append(request.output(now))

    def _give_up(self, message: str) -> None:
        for live in list(self._answers.values()):
            if not live.ended:
                self._cut(live, FinishReason.ERROR, message)
        self._hand_out()

    def _take_prompt_logprobs(self, result: StepResult) -> None:
        for seq_id, found in result.prompt_logprobs.items():
            if (live := self._answers.get(seq_id)) is not None:
                live.request.take_prompt_logprobs(seq_id, list(found))

    def _hand_out(self) -> None:
        """One delta per answer that moved, if its request streams; then the outputs of the finished."""
        for live in self._touched.values():
            prepared = live.request.prepared
            if prepared.stream:
                error = live.request.error if live.answer.output.finish_reason is FinishReason.ERROR else None
                self._outputs.append(live.answer.delta(prepared.index, error))
        self._touched.clear()
        self._outputs += self._finished
        self._finished.clear()

    # -- the log

    def _count_step(self, plan: StepPlan, errors: dict[str, str]) -> None:
        for item in plan.items:
            live = self._answers.get(item.seq_id)
            if live is not None and not live.answer.closed and item.seq_id not in errors:
                live.steps += 1
                live.last_step = plan.step_id

    def _log_plan(self, plan: StepPlan, now: float) -> None:
        for seq_id in plan.preempted:
            if (live := self._answers.get(seq_id)) is not None:
                self._log(Kind.PREEMPTED, now, live, step_id=plan.step_id)
        for seq_id, cached in plan.admitted:
            self._log(Kind.ADMITTED, now, self._answers[seq_id], cached, plan.step_id)

    def _log(self, kind: Kind, now: float, live: LiveAnswer, value: int = 0, step_id: int = -1, *rest: Any) -> None:
        request_id = live.request.request.request_id
        self.log.add(SequenceEvent(kind, now, request_id, live.sequence.seq_id, value, step_id, *rest))


def _lost(plan: StepPlan, result: StepResult) -> dict[str, str]:
    """Rows that should have one new token and have not."""
    return {
        item.seq_id: f"the executor gave {len(result.tokens.get(item.seq_id, ()))} tokens instead of one"
        for item in plan.items
        if item.samples and len(result.tokens.get(item.seq_id, ())) != 1
    }


def describe(error: BaseException) -> str:
    """One line for a person: the message, and the type unless the error is one of ours."""
    if isinstance(error, LiushuiError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
