"""The engine's side of the face: a token loop that takes orders and tells what happens, over any channel.

The same code serves on a thread of the server's process and in a process of its own; only the channel differs.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from liushui.core.cost import Pacer
from liushui.core.plan import Executor, StepPlan, TokenLogprobs
from liushui.core.request import FinishReason, Request
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence, Status
from liushui.engine.events import EventLog, House
from liushui.engine.loop import TokenLoop, describe
from liushui.engine.messages import (
    Ended,
    Facts,
    Fullness,
    Orders,
    PromptLogprobs,
    SequenceTimes,
    Step,
    Tokens,
    Told,
    View,
)

_LOG = 20_000
"""Events and steps that the log of a server keeps."""
BIG = 4096
"""Log-probabilities in one message, each token counting as one more; what is more goes in several, so that none takes
long to read."""


@dataclass(frozen=True, slots=True)
class Core:
    """What a token loop is made of."""

    scheduler: Scheduler
    executor: Executor
    vocab_size: int
    depth: int = 0
    house: House = field(default_factory=House)
    report: Seq[str] = ()

    def facts(self) -> Facts:
        pool = self.scheduler.pool
        return Facts(
            pool.num_blocks,
            pool.block_size,
            self.scheduler.max_model_len,
            self.vocab_size,
            self.scheduler.max_num_seqs,
            tuple(self.report),
        )


class Hangup(Exception):
    """Nobody is at the other end any more."""


class Channel(Protocol):
    """To whoever gives the orders."""

    def receive(self, *, wait: bool) -> list[Orders]:
        """All that has come; with `wait`, not before there is something. Raises `Hangup`."""
        ...

    def send(self, told: Told) -> None:
        """Never blocks: what cannot go now goes with a later call. It cannot pile up without end: who does not listen
        gives no new orders."""
        ...


class Attendant:
    """Obeys orders between steps; the `Reader` of its loop."""

    def __init__(
        self,
        core: Core,
        channel: Channel,
        pacer: Pacer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.loop = TokenLoop(
            core.scheduler,
            core.executor,
            self,
            EventLog(core.house, limit=_LOG),
            clock,
            depth=core.depth,
            pacer=pacer,
        )
        self._channel = channel
        self._told = Told()
        self._weight = 0
        """Log-probabilities in it."""
        self._news = False

    def run(self) -> None:
        """Until it is told to close, or nobody is there any more."""
        try:
            while self._obey(self._channel.receive(wait=not self.loop.busy)):
                self._tell()
                if self.loop.busy:
                    self.loop.step()
                    self._tell()
        except Hangup:
            return

    def _obey(self, batches: list[Orders]) -> bool:
        for orders in batches:
            for request in orders.submit:
                self._submit(request)
            for seq_id in orders.finish:
                self.loop.finish(seq_id)
            for request_id, reason in orders.end:
                self.loop.end(request_id, reason)
            for number in orders.ask:
                self._told.views.append((number, views(self.core.scheduler)))
                self._news = True
            if orders.close:
                return False
        return True

    def _submit(self, request: Request) -> None:
        try:
            self.loop.submit(request)
        except Exception as error:
            for index in range(request.sampling.n):
                self.ended(request.seq_id(index), FinishReason.ERROR, SequenceTimes(), describe(error))

    def _tell(self) -> None:
        if not self._news:
            return
        scheduler = self.core.scheduler
        self._told.house = Fullness(
            scheduler.num_waiting,
            scheduler.num_running,
            scheduler.pool.num_free,
            scheduler.pool.num_blocks,
            scheduler.num_preemptions,
            scheduler.num_hit_tokens,
        )
        told, self._told, self._weight, self._news = self._told, Told(), 0, False
        self._channel.send(told)

    def _weigh(self, more: int) -> None:
        """Send what there is, if it is enough for a message."""
        self._weight += more
        if self._weight >= BIG:
            self._news = True
            self._tell()

    # -- what the loop tells

    def tokens(self, seq_id: str, token_ids: Seq[int], logprobs: Seq[TokenLogprobs]) -> bool:
        self._told.tokens.append(Tokens(seq_id, tuple(token_ids), tuple(logprobs)))
        self._weigh(len(token_ids) + sum(len(found.top) for found in logprobs))
        return False

    def prompt_logprobs(self, seq_id: str, found: Seq[tuple[int, TokenLogprobs]]) -> None:
        size = max(1, BIG // 4 // (1 + max((len(one.top) for _, one in found), default=0)))
        for start in range(0, len(found), size):
            part = tuple(found[start : start + size])
            self._told.prompt_logprobs.append(PromptLogprobs(seq_id, part))
            self._weigh(sum(1 + len(one.top) for _, one in part))

    def ended(self, seq_id: str, reason: FinishReason, times: SequenceTimes, error: str | None) -> FinishReason:
        self._told.ended.append(Ended(seq_id, reason, times, error))
        self._news = True
        return reason

    def planned(self, plan: StepPlan) -> None:
        self._told.preempted.extend(plan.preempted)
        self._told.admitted.extend(seq_id for seq_id, _ in plan.admitted)

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        self._told.steps.append(Step(seconds, plan.num_tokens, len(plan.items)))
        self._news = True


def views(scheduler: Scheduler) -> list[View]:
    """Everybody who is there: first those who run, then those who wait, in order."""
    running, waiting = scheduler.running, scheduler.waiting
    seen = [
        View(seq.seq_id, "running", _what_it_does(seq), seq.num_prompt, len(seq.output_token_ids)) for seq in running
    ]
    for place, seq in enumerate(waiting):
        state = "preempted" if seq.admitted_at is not None else "waiting"
        seen.append(View(seq.seq_id, state, _why(scheduler, seq, place), seq.num_prompt, len(seq.output_token_ids)))
    return seen


def _what_it_does(seq: Sequence) -> str:
    if seq.num_computed < seq.num_prompt and seq.status is Status.RUNNING:
        return f"its prompt is being computed, {seq.num_computed:,} of {seq.num_prompt:,} tokens"
    return f"writes token {len(seq.output_token_ids) + 1:,} of at most {seq.request.max_tokens:,}"


def _why(scheduler: Scheduler, seq: Sequence, place: int) -> str:
    pool = scheduler.pool
    needed, spare = pool.blocks_for(seq.num_known), max(scheduler.watermark, scheduler.num_running)
    if scheduler.num_running >= scheduler.max_num_seqs:
        why = f"all {scheduler.max_num_seqs:,} places are taken"
    elif pool.num_free < needed + spare:
        why = (
            f"the KV cache has {pool.num_free:,} free blocks; it needs {needed:,}, {spare:,} are kept for those running"
        )
    else:
        why = "it enters when the prompts before it are computed"
    return why + (f"; {place:,} before it in the queue" if place else "")
