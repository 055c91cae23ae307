"""`AsyncEngine`: the text side of a served engine, for one event loop. See `serving` for what it promises.

    submit -> bounded queue -> Orders ====> token loop (a thread, or a process)
    readers <- text <- Told   <====

If the loop dies, requests of which no reader has seen anything are sent again to the next one, under a new name: their
answers are the same, whoever computes them. The others end with an error. A loop in a process of its own that hangs is
killed (`supervision`), and so dies. Whatever happens, every request ends: a timer here stands behind the loop's own
deadlines.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from liushui.config import EngineConfig, ServingConfig
from liushui.core.request import FinishReason, Request
from liushui.engine.admission import Queue
from liushui.engine.inputs import InputProcessor, Limits
from liushui.engine.links import Link
from liushui.engine.live import LiveAnswer
from liushui.engine.loop import describe
from liushui.engine.messages import Ended, Facts, Orders, Tokens, Told, View
from liushui.engine.meter import Meter
from liushui.engine.serving import (
    EngineInfo,
    Readiness,
    RequestView,
    ServeRequest,
    Stats,
    effective_timeout,
    salt,
)
from liushui.engine.startup import TextSide
from liushui.engine.text import Vocabulary
from liushui.engine.ticket import Ticket
from liushui.engine.tokenizer import Tokenizer
from liushui.errors import LiushuiError, Overloaded, ParameterError

ATTEMPTS = 3
"""Times that a request is sent to a loop, if the loops die."""
_BACKOFF = (0.0, 0.5, 2.0, 5.0)
"""Seconds before a dead loop is started again, by how many have died without answering anything."""
_GRACE = 1.0
"""Seconds after its deadline when a request is ended from here."""
_MAX_PRIORITY = 100
_CODES = {FinishReason.ABORT: "aborted", FinishReason.TIMEOUT: "timeout", FinishReason.ERROR: "model_error"}
_CLOSING = "the server is shutting down"
_WORDS = {FinishReason.ABORT: "the request was aborted", FinishReason.TIMEOUT: "its deadline has passed"}


@dataclass(slots=True)
class Outgoing:
    """Orders that come together until they are sent."""

    submit: list[Request] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    end: list[tuple[str, FinishReason]] = field(default_factory=list)
    ask: list[int] = field(default_factory=list)

    def take(self) -> Orders | None:
        """All of them, once; None if there are none."""
        if not (self.submit or self.finish or self.end or self.ask):
            return None
        orders = Orders(tuple(self.submit), tuple(self.finish), tuple(self.end), tuple(self.ask))
        self.clear()
        return orders

    def clear(self) -> None:
        for orders in (self.submit, self.finish, self.end, self.ask):
            orders.clear()


class AsyncEngine:
    """`ServingEngine` over any `Link`."""

    def __init__(
        self, config: EngineConfig, serving: ServingConfig, link: Link, load_text: Callable[[], TextSide]
    ) -> None:
        """`load_text` is called on a thread."""
        self.config = config.validate()
        self.serving = serving.validate()
        self._link = link
        self._load_text = load_text
        self._meter = Meter()
        self._tickets: dict[str, Ticket] = {}
        self._answers: dict[str, tuple[Ticket, LiveAnswer]] = {}
        self._ids: dict[str, Ticket] = {}
        self._orders = Outgoing()
        self._queue = Queue(self.serving, 1)
        self._questions: dict[int, asyncio.Future[list[View]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._down = "starting"
        """Why there is no loop: starting, restarting, failed; "": there is one."""
        self._why = "the model is being loaded"
        self._draining = False
        self._serial = self._asked = self._deaths = 0

    # -- life

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text.tokenizer

    async def start(self) -> None:
        self._text = text = await asyncio.to_thread(self._load_text)
        self._vocab = Vocabulary(text.tokenizer.raw)
        self._inputs = InputProcessor(
            text.tokenizer,
            Limits(1, 1, 1),  # until the loop says what it has
            eos_token_ids=text.tokenizer.eos_token_ids,
            bos_token_id=text.tokenizer.bos_token_id,
            truncation_side=self.config.truncation_side,
            seed=self.config.seed,
            sampling_defaults=text.sampling_defaults,
        )
        self._up(await self._link.start(self._hear, self._died))

    async def drain(self, timeout: float | None = None) -> bool:
        self._draining = True
        try:
            await asyncio.wait_for(self._emptied(), timeout)
        except TimeoutError:
            self._end_all(FinishReason.ABORT, "the server was shut down before it was done", "aborted")
            return False
        return True

    async def close(self) -> None:
        self._draining = True
        for task in self._tasks:
            task.cancel()
        self._end_all(FinishReason.ABORT, "the server was shut down", "aborted")
        await self._link.close()

    # -- requests

    async def submit(self, request: ServeRequest) -> Ticket:
        self.check_room(len(request.prompt_token_ids) * request.params.n)
        now = time.monotonic()
        ticket = self._accept(request, now)
        self._enrol(ticket)
        self._send()
        return ticket

    def check_room(self, num_tokens: int = 1) -> None:
        now = time.monotonic()
        if self._draining:
            self._refuse(Overloaded("draining", _CLOSING, self._queue.retry_after(now)))
        if self._down in ("starting", "failed"):
            self._refuse(Overloaded(self._down, self._why, self._queue.retry_after(now)))
        try:
            self._queue.check(num_tokens, now)
        except Overloaded as error:
            self._refuse(error)

    async def abort(self, request_id: str) -> bool:
        ticket = self._ids.get(request_id)
        if ticket is None:
            return False
        self._leave(ticket, FinishReason.ABORT)
        self._send()
        return True

    def give_up(self, ticket: Ticket) -> None:
        self._leave(ticket, FinishReason.ABORT)
        self._send()

    # -- what can be seen

    def stats(self) -> Stats:
        return self._meter.stats(self._queue, len(self._tickets), time.monotonic())

    def ready(self) -> Readiness:
        if self._draining or self._down:
            return Readiness(False, _CLOSING if self._draining else self._why)
        quiet = self._link.watch.quiet
        if quiet > self.serving.stall:
            return Readiness(False, f"no step has come back for {quiet:.0f} s, and {len(self._tickets)} requests wait")
        return Readiness(True, "")

    async def requests(self) -> list[RequestView]:
        now = time.monotonic()
        seen = {view.seq_id: view for view in await self._ask()}
        views = [self._view(seq_id, view, now) for seq_id, view in seen.items() if seq_id in self._answers]
        for seq_id, (ticket, live) in self._answers.items():
            if seq_id not in seen and not live.ended:
                why = self._why if self._down else "sent to the engine"
                size = len(ticket.wire.prompt_token_ids)
                view = View(seq_id, "waiting", why, size, len(live.answer.output.token_ids))
                views.append(self._view(seq_id, view, now))
        return views

    def _view(self, seq_id: str, view: View, now: float) -> RequestView:
        ticket, live = self._answers[seq_id]
        request = ticket.wire
        return RequestView(
            ticket.prepared.request.seq_id(live.answer.output.index),
            request.tenant,
            view.state,
            view.why,
            view.prompt_tokens,
            len(live.answer.output.token_ids),
            request.priority,
            now - request.arrival_time,
            None if request.deadline is None else request.deadline - now,
        )

    async def _ask(self) -> list[View]:
        """Who is there, in the loop's own words; nobody, if it does not answer at once."""
        if self._down:
            return []
        self._asked += 1
        number = self._asked
        self._questions[number] = asyncio.get_running_loop().create_future()
        self._orders.ask.append(number)
        self._send()
        try:
            return await asyncio.wait_for(self._questions[number], 1.0)
        except TimeoutError:
            return []
        finally:
            self._questions.pop(number, None)

    # -- in

    def _settle(self, facts: Facts) -> None:
        """What the loop says of itself makes the limits of requests."""
        tokenizer = self._text.tokenizer
        limits = Limits(facts.max_model_len, facts.num_blocks * facts.block_size + 1, facts.vocab_size)
        self._inputs.limits = limits
        self._queue.seats = facts.max_num_seqs
        self._info = EngineInfo(
            model=self.config.model,
            served_names=self.serving.served_names or (self.config.model,),
            limits=limits,
            max_num_seqs=facts.max_num_seqs,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            add_bos=tokenizer.add_bos,
            chat_template_hash=tokenizer.template_hash,
            report=(*facts.report, *self._text.report),
        )

    def _accept(self, request: ServeRequest, now: float) -> Ticket:
        """Check it, and make its ticket."""
        if not -_MAX_PRIORITY <= request.priority <= _MAX_PRIORITY:
            raise ParameterError("priority", f"must be in [-{_MAX_PRIORITY}, {_MAX_PRIORITY}], got {request.priority}")
        if request.timeout is not None and not 0 < request.timeout < float("inf"):
            raise ParameterError("timeout", f"must be a positive number of seconds, got {request.timeout}")
        seconds = effective_timeout(request.timeout, self.serving.timeout)
        prepared = self._inputs.prepare(
            list(request.prompt_token_ids),
            request.params,
            now=now,
            index=request.index,
            request_id=request.request_id,
            prompt_text=request.prompt,
            stream=request.stream,
            priority=request.priority,
            cache_salt=salt(request.tenant, request.cache_salt),
        )
        if prepared.request.request_id in self._ids:
            raise ParameterError("request_id", f"{prepared.request.request_id!r} is in use; choose another")
        deadline = None if seconds is None else now + seconds
        prepared = replace(prepared, request=replace(prepared.request, tenant=request.tenant, deadline=deadline))
        ticket = Ticket(self, prepared, self._renamed(prepared.request), self._vocab)
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(seconds + _GRACE, self._too_late, ticket)
            ticket.timer = timer
        self._meter.accepted(len(prepared.request.prompt_token_ids))
        return ticket

    def _renamed(self, request: Request) -> Request:
        """Under a name no attempt had before: late news of one that was given up cannot be taken for another's."""
        self._serial += 1
        return replace(request, request_id=str(self._serial))

    def _enrol(self, ticket: Ticket) -> None:
        """Put it on the books and into the queue."""
        self._tickets[ticket.wire.request_id] = ticket
        self._ids[ticket.request_id] = ticket
        for live in ticket.live.answers:
            self._answers[ticket.wire.seq_id(live.answer.output.index)] = (ticket, live)
        ticket.waits = True
        self._queue.join(ticket.num_tokens)
        self._idle.clear()
        self._orders.submit.append(ticket.wire)

    def _strike(self, ticket: Ticket) -> None:
        """Off the books."""
        del self._tickets[ticket.wire.request_id]
        if self._ids.get(ticket.request_id) is ticket:
            del self._ids[ticket.request_id]
        for live in ticket.live.answers:
            self._answers.pop(ticket.wire.seq_id(live.answer.output.index), None)
        if ticket.waits:
            ticket.waits = False
            self._queue.leave(ticket.num_tokens)
        if not self._tickets:
            self._idle.set()

    def _send(self) -> None:
        """Hand over the orders that have come together."""
        if not self._down and (orders := self._orders.take()) is not None:
            self._link.send(orders)

    # -- out

    def _hear(self, told: Told) -> None:
        """News of the loop, in order."""
        now = time.monotonic()
        self._meter.stepped(told.steps, told.house)
        self._queue.seated = told.house.running
        for seq_id in told.admitted:
            self._admitted(seq_id, now)
        for found in told.prompt_logprobs:
            if (entry := self._answers.get(found.seq_id)) is not None:
                ticket, live = entry
                ticket.live.take_prompt_logprobs(live.seq_id, found.found)
        for tokens in told.tokens:
            self._read(tokens, now)
        for ended in told.ended:
            self._ended(ended)
        for number, views in told.views:
            if (question := self._questions.get(number)) is not None and not question.done():
                question.set_result(views)
        if told.steps:
            self._deaths = 0
        self._send()

    def _admitted(self, seq_id: str, now: float) -> None:
        entry = self._answers.get(seq_id)
        if entry is not None and entry[0].waits:
            entry[0].waits = False
            self._queue.entered(entry[0].num_tokens, now)

    def _read(self, tokens: Tokens, now: float) -> None:
        """New tokens: text, or waste if their answer is closed."""
        entry, count = self._answers.get(tokens.seq_id), len(tokens.token_ids)
        if entry is None or entry[1].answer.closed or entry[0].leaving is not None:
            self._meter.counters["wasted_tokens"] += count
            return
        ticket, live = entry
        index = live.answer.output.index
        if index in ticket.last_token:
            self._meter.gap(now - ticket.last_token[index], count)
        ticket.last_token[index] = now
        before = len(live.answer.output.token_ids)
        try:
            if live.answer.extend(tokens.token_ids, tokens.logprobs):
                self._orders.finish.append(tokens.seq_id)
        except Exception as error:
            ticket.live.error = f"the text could not be made: {describe(error)}"
            live.answer.closed = True
            self._leave(ticket, FinishReason.ERROR)
        kept = len(live.answer.output.token_ids) - before
        self._meter.tokens(kept, now)
        self._meter.counters["wasted_tokens"] += count - kept
        ticket.touch(live)

    def _ended(self, ended: Ended) -> None:
        entry = self._answers.get(ended.seq_id)
        if entry is None or entry[1].ended:
            return
        ticket, live = entry
        live.end(ended.reason, ended.times, ended.error)
        ticket.touch(live)
        if ticket.live.finished:
            finished = max(
                (a.times.finished for a in ticket.live.answers if a.times.finished is not None), default=None
            )
            self._close(ticket, finished)

    def _close(self, ticket: Ticket, finished: float | None, code: str | None = None) -> None:
        """All its answers have ended: hand out the whole."""
        output = ticket.live.output(finished)
        reasons = {answer.finish_reason for answer in output.outputs}
        for reason in (FinishReason.ERROR, FinishReason.TIMEOUT, FinishReason.ABORT):
            if reason in reasons:
                output.error = output.error or _WORDS.get(reason)
                output.error_code = code or _CODES[reason]
                break
        self._meter.ended(output)
        self._strike(ticket)
        ticket.finish(output)

    # -- ends from this side

    def _leave(self, ticket: Ticket, reason: FinishReason) -> None:
        """Ask the loop to end it. What it still sends is waste."""
        if ticket.output is not None or ticket.leaving is not None:
            return
        ticket.leaving = reason
        if self._down:
            self._cut(ticket, reason, ticket.live.error)
        else:
            self._orders.end.append((ticket.wire.request_id, reason))

    def _cut(self, ticket: Ticket, reason: FinishReason, error: str | None, code: str | None = None) -> None:
        """End it here and now, with what there is of it. An answer that is complete stays so."""
        now = time.monotonic()
        for live in ticket.live.answers:
            if not live.ended:
                complete = (
                    live.answer.closed and live.answer.output.finish_reason is None and reason is not FinishReason.ERROR
                )
                done = live.times._replace(finished=now)
                live.end(FinishReason.STOP if complete else reason, done, None if complete else error)
                ticket.touch(live)
        if ticket.wire in self._orders.submit:
            self._orders.submit.remove(ticket.wire)
        elif not self._down:
            self._orders.end.append((ticket.wire.request_id, reason))
        self._close(ticket, now, code)

    def _too_late(self, ticket: Ticket) -> None:
        """The loop should have ended it by now. It may hang, or be down."""
        if ticket.output is None:
            self._cut(ticket, FinishReason.TIMEOUT, None)
            self._send()

    def _end_all(self, reason: FinishReason, error: str, code: str) -> None:
        for ticket in list(self._tickets.values()):
            self._cut(ticket, reason, error, code)
        self._send()

    def _refuse(self, error: Overloaded) -> None:
        self._meter.refused[error.reason] += 1
        raise error

    async def _emptied(self) -> None:
        while self._tickets:
            self._idle.clear()
            await self._idle.wait()

    # -- death and after

    def _up(self, facts: Facts) -> None:
        self._settle(facts)
        self._down = self._why = ""
        self._send()

    def _died(self, why: str) -> None:
        """The loop is gone. What was half seen ends; the rest waits for the next one."""
        self._down, self._why = "restarting" if self._link.restarts else "failed", why
        self._meter.restarted()
        self._queue.seated = 0
        self._orders.clear()
        for ticket in list(self._tickets.values()):
            self._after_death(ticket)
        if self._link.restarts:
            task = asyncio.get_running_loop().create_task(self._restart())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _after_death(self, ticket: Ticket) -> None:
        closed = all(live.ended or live.answer.closed for live in ticket.live.answers)
        if ticket.leaving is not None or closed:
            self._cut(ticket, ticket.leaving or FinishReason.STOP, ticket.live.error)
        elif self._down == "failed" or ticket.sent or ticket.attempts >= ATTEMPTS:
            times = f" ({ATTEMPTS} times with this request)" if ticket.attempts >= ATTEMPTS else ""
            self._cut(ticket, FinishReason.ERROR, f"{self._why}{times}", "engine_died")
        else:
            self._strike(ticket)
            ticket.restart(self._renamed(ticket.prepared.request), self._vocab)
            self._enrol(ticket)
            self._meter.counters["retried_requests"] += 1

    async def _restart(self) -> None:
        """Start it again, later and later; give up after as many failures in a row as there are pauses."""
        why = self._why
        while self._deaths < len(_BACKOFF):
            pause = _BACKOFF[self._deaths]
            self._deaths += 1
            self._why = f"{why}; it is started again"
            await asyncio.sleep(pause)
            try:
                self._up(await self._link.start(self._hear, self._died))
            except LiushuiError as error:
                why = str(error)
                continue
            return
        self._down, self._why = "failed", f"{why}; it has died too often and is not started again"
        self._end_all(FinishReason.ERROR, self._why, "engine_died")
