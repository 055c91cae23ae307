"""The loop: schedule, execute, update. Tokens only; what becomes of them is its reader's affair.

    depth 0      plan 1 | run 1 | learn 1 | plan 2 | run 2 | learn 2 | ...
    depth 1      plan 1 | run 1 ......... | run 2 ......... | run 3 ...
                        plan 2 | learn 1 |  plan 3 | learn 2 |

It is one loop: `step` plans and starts a step, and takes in the oldest one when more than `depth` are in flight.

What goes wrong stays where it is: a row that the executor gives up, a reader that fails, a whole step that raises. The
sequences concerned end with `FinishReason.ERROR` and a message, all others go on. Not thread-safe.
"""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

from liushui.core.cost import Pacer
from liushui.core.plan import Event, Executor, Pending, StepPlan, StepResult, TokenLogprobs, TokensEvent
from liushui.core.request import FinishReason, Request
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence, Status
from liushui.engine.events import EventLog, Kind, SequenceEvent
from liushui.engine.messages import SequenceTimes
from liushui.errors import LiushuiError, ParameterError


class Reader(Protocol):
    """Takes the news of the loop, in the order in which they happen."""

    def tokens(self, seq_id: str, token_ids: Seq[int], logprobs: Seq[TokenLogprobs]) -> bool:
        """New tokens of a sequence. Returns True if they complete a stop string: the sequence ends here. An exception
        ends it with an error."""
        ...

    def prompt_logprobs(self, seq_id: str, found: Seq[tuple[int, TokenLogprobs]]) -> None: ...

    def ended(self, seq_id: str, reason: FinishReason, times: SequenceTimes, error: str | None) -> FinishReason:
        """A sequence has left. Returns the reason as its user is told it."""
        ...

    def planned(self, plan: StepPlan) -> None:
        """A step is about to start."""
        ...

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        """A step has come back, after that long (of two that overlap, the earlier one has all of the overlap)."""
        ...


class Life:
    """One sequence between its arrival and its end, and when it moved."""

    __slots__ = (
        "first_token",
        "last_step",
        "last_token",
        "mates",
        "out_since",
        "preempted",
        "request_id",
        "seq",
        "steps",
    )

    def __init__(self, request_id: str, seq: Sequence) -> None:
        self.request_id = request_id
        self.seq = seq
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.steps = 0
        self.mates = 0
        self.last_step = -1
        """The last step that advanced it."""
        self.out_since: float | None = None
        """When it was preempted, while it is."""
        self.preempted = 0.0

    @property
    def over(self) -> bool:
        """It takes no more tokens, though it may be told later (static groups)."""
        return self.seq.status in (Status.HELD, Status.ENDED)

    def come_back(self, now: float) -> None:
        if self.out_since is not None:
            self.preempted += now - self.out_since
            self.out_since = None

    def times(self, finished: float) -> SequenceTimes:
        self.come_back(finished)
        return SequenceTimes(
            self.seq.admitted_at,
            self.first_token,
            self.last_token,
            finished,
            self.seq.num_preemptions,
            self.preempted,
            self.steps,
            self.mates,
            self.seq.num_cached,
        )


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

    @property
    def alone(self) -> bool:
        return False


class TokenLoop:
    """Requests in, tokens out, one step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        reader: Reader,
        log: EventLog,
        clock: Callable[[], float],
        *,
        depth: int = 0,
        pacer: Pacer | None = None,
    ) -> None:
        """`clock`: seconds, monotonic. `depth`: steps kept in flight while the next one is planned. `pacer`: bounds
        steps in time; None: in tokens only."""
        self.scheduler = scheduler
        self.executor = executor
        self.reader = reader
        self.log = log
        self.clock = clock
        self.depth = depth
        self.pacer = pacer
        self.num_output_tokens = 0
        """Of all answers since the start."""
        self._lives: dict[str, Life] = {}
        self._requests: dict[str, list[Life]] = {}
        self._flights: deque[Flight] = deque()
        self._last_end = 0.0

    # -- in and out

    def submit(self, request: Request) -> list[Sequence]:
        """Accept a request: each of its sequences ends in exactly one `Reader.ended`. Returns them. Raises
        `ParameterError` for an id in use, `CapacityError` for what can never fit."""
        request_id = request.request_id
        if request_id in self._requests:
            raise ParameterError("request_id", f"{request_id!r} is in use; choose another")
        lives = [Life(request_id, Sequence(request, index)) for index in range(request.sampling.n)]
        added: list[str] = []
        try:
            for life in lives:
                self.scheduler.add(life.seq)
                added.append(life.seq.seq_id)
        except Exception:
            for seq_id in added:
                self.scheduler.abort(seq_id)
            raise
        self._requests[request_id] = lives
        self._lives.update((life.seq.seq_id, life) for life in lives)
        arrival, num_prompt = request.arrival_time, len(request.prompt_token_ids)
        self.log.add(SequenceEvent(Kind.ARRIVED, arrival, request_id, request_id, num_prompt))
        return [life.seq for life in lives]

    def end(self, request_id: str, reason: FinishReason, error: str | None = None) -> bool:
        """End a request now; its KV blocks return with the last step in flight that names it. False: not here."""
        lives = self._requests.get(request_id, [])
        for life in list(lives):
            if life.seq.seq_id in self._lives:
                self._cut(life, reason, error)
        return bool(lives)

    def finish(self, seq_id: str) -> None:
        """A stop string of this sequence was found outside: end it as its own last token would."""
        self._take(self.scheduler.finish(seq_id), StepResult(tokens={}), self.clock())

    def drain(self) -> None:
        """Take in every step in flight without planning another."""
        while self._flights:
            self._retire()

    @property
    def busy(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._lives or self._flights)

    # -- a turn

    def step(self) -> None:
        """One turn of the loop."""
        now = self.clock()
        for seq_id in self.scheduler.overdue(now):
            if (late := self._lives.get(seq_id)) is not None and not late.over:
                self._cut(late, FinishReason.TIMEOUT, "its deadline has passed")
        plan = self.scheduler.schedule(now) if self.pacer is None else self.scheduler.schedule(now, self.pacer.pace())
        if plan is not None:
            if plan.preempted or plan.admitted:
                self._note_plan(plan, now)
            self.reader.planned(plan)
            self._launch(plan)
        if self._flights and (plan is None or len(self._flights) > self.depth or self._flights[-1].pending.alone):
            self._retire()
        elif plan is None and self._lives:
            self._give_up("the scheduler has nothing to run, though requests wait: a bug, please report it")

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
        self._note_step(flight, end, errors)
        for seq_id, message in errors.items():
            if (life := self._lives.get(seq_id)) is not None and not life.over:
                self._cut(life, FinishReason.ERROR, message)
        for seq_id, found in result.prompt_logprobs.items():
            if seq_id in self._lives:
                self.reader.prompt_logprobs(seq_id, found)
        self._take(self.scheduler.update(flight.plan, result.tokens), result, end)

    # -- news of a step

    def _take(self, events: Iterable[Event], result: StepResult, now: float) -> None:
        """Hand events to the reader. Ending a sequence may let others go: their events join the queue."""
        queue = deque(events)
        while queue:
            event = queue.popleft()
            life = self._lives.get(event.seq_id)
            if life is None:
                continue
            if not isinstance(event, TokensEvent):
                self._end(life, event.reason, now)
                continue
            self._note_tokens(life, len(event.token_ids), now)
            try:
                stopped = self.reader.tokens(event.seq_id, event.token_ids, result.logprobs.get(event.seq_id, ()))
            except Exception as error:
                self._cut(life, FinishReason.ERROR, f"the text could not be made: {describe(error)}")
                continue
            if stopped:
                queue.extend(self.scheduler.finish(event.seq_id, FinishReason.STOP))

    def _cut(self, life: Life, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence from outside, now. Under the static policy this may let the rest of its group go."""
        freed = self.scheduler.abort(life.seq.seq_id, reason)
        self._end(life, reason, self.clock(), error)
        self._take(freed, StepResult(tokens={}), self.clock())

    def _end(self, life: Life, reason: FinishReason, now: float, error: str | None = None) -> None:
        """The sequence has left the batch."""
        seq_id = life.seq.seq_id
        del self._lives[seq_id]
        if not any(other.seq.seq_id in self._lives for other in self._requests[life.request_id]):
            del self._requests[life.request_id]
        told = self.reader.ended(seq_id, reason, life.times(now), error)
        self._log(Kind.FINISHED, now, life, len(life.seq.output_token_ids), life.last_step, told, life.last_token)

    def _give_up(self, message: str) -> None:
        for life in list(self._lives.values()):
            if life.seq.seq_id in self._lives:
                self._cut(life, FinishReason.ERROR, message)

    # -- notes

    def _note_plan(self, plan: StepPlan, now: float) -> None:
        for seq_id in plan.preempted:
            if (life := self._lives.get(seq_id)) is not None:
                life.out_since = now
                self._log(Kind.PREEMPTED, now, life, step_id=plan.step_id)
        for seq_id, cached in plan.admitted:
            life = self._lives[seq_id]
            life.come_back(now)
            self._log(Kind.ADMITTED, now, life, cached, plan.step_id)

    def _note_step(self, flight: Flight, end: float, errors: dict[str, str]) -> None:
        plan = flight.plan
        self.log.add_step(plan, flight.start, end, flight.waiting, flight.running, flight.free_blocks)
        seconds = end - max(flight.start, self._last_end)
        self._last_end = end
        if self.pacer is not None and not errors:
            self.pacer.observe(plan, seconds)
        self.reader.stepped(plan, seconds)
        for item in plan.items:
            life = self._lives.get(item.seq_id)
            if life is not None and not life.over and item.seq_id not in errors:
                life.steps += 1
                life.mates += len(plan.items) - 1
                life.last_step = plan.step_id

    def _note_tokens(self, life: Life, count: int, now: float) -> None:
        if life.first_token is None:
            life.first_token = now
            self._log(Kind.FIRST_TOKEN, now, life, step_id=life.last_step)
        life.last_token = now
        self.num_output_tokens += count

    def _log(self, kind: Kind, now: float, life: Life, value: int = 0, step_id: int = -1, *rest: Any) -> None:
        self.log.add(SequenceEvent(kind, now, life.request_id, life.seq.seq_id, value, step_id, *rest))


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
