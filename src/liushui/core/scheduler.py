"""The scheduler: which sequences advance in each step, by how many tokens, in which blocks.

Pure decisions over integers: no tensors, no text, no clock. The engine's loop is

    plan = scheduler.schedule(now)          # may be called up to D times ahead (depth D; 0 = synchronous)
    pending = executor.execute(plan)
    scheduler.update(plan, pending.result().tokens)         # plans retire in the order they were made

A sequence goes round like this; only `update`, `finish` and `abort` end it:

    add -> WAITING -> RUNNING -> (HELD: static groups only) -> ENDED
              ^----------'  preempted: computed again from what is cached
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Literal

from liushui.core import policy as choose
from liushui.core.blocks import BlockPool
from liushui.core.cost import Pace
from liushui.core.draft import Draft
from liushui.core.integrity import check_scheduler
from liushui.core.plan import Event, FinishedEvent, StepPlan, TokensEvent
from liushui.core.request import FinishReason
from liushui.core.sequence import Sequence, Status
from liushui.errors import CapacityError, ParameterError


class Scheduler:
    """Iteration-level scheduling (Orca, Yu et al. 2022) over paged KV memory, with prefix caching."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: Literal["continuous", "static"] = "continuous",
        prefix_caching: bool = True,
        ageing: float | None = None,
    ) -> None:
        """`ageing`: seconds in the queue that count as one step of priority; None: priorities are absolute."""
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        self.policy = choose.POLICIES[policy]
        self.ageing = ageing
        self.watermark = max(1, pool.num_blocks // 100)
        """Fewest free blocks that an admission leaves to those who run."""

        self._sequences: dict[str, Sequence] = {}
        self._followers: dict[str, list[Sequence]] = {}  # leader -> other answers of its request, see `_leader`
        self._waiting: list[Sequence] = []  # these two are always sorted by choose.order
        self._running: list[Sequence] = []
        self._held: list[tuple[Sequence, FinishedEvent]] = []  # ended, not yet told
        self._plans: deque[StepPlan] = deque()  # in flight, oldest first
        self._free_slots = list(range(max_num_seqs))
        heapify(self._free_slots)
        self._shares = choose.Shares()
        self._deadlines: list[tuple[float, int, str]] = []  # (deadline, arrival, sequence), a heap
        self._dropped: list[str] = []  # news for the next plan
        self._preempted: list[str] = []
        self._next_step = 0
        self._next_arrival = 0

        self.num_hit_tokens = 0
        """Tokens read from the prefix cache instead of computed, since the start."""
        self.num_preemptions = 0

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The queue, in order (each tenant's own, if there are several)."""
        return tuple(sorted(chain(self._waiting, *self._followers.values()), key=choose.order))

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The batch, in order."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._followers.values()))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to schedule or to update."""
        return bool(self._waiting or self._running or self._plans)

    # -- in and out

    def add(self, seq: Sequence) -> None:
        """Put a new sequence in the queue. Raises `CapacityError` for one that could never run to its end."""
        if seq.seq_id in self._sequences:
            raise ParameterError("request_id", f"{seq.seq_id!r} is in use; choose another")
        if not seq.num_prompt:
            raise ParameterError("prompt", "has no tokens; give at least one")
        # The last token of an answer is never fed, so it needs no block.
        in_memory = self.pool.num_blocks * self.pool.block_size + 1
        limit = min(self.max_model_len, in_memory)
        what = "max_model_len" if limit == self.max_model_len else "the KV cache"
        if seq.num_prompt >= limit:
            raise CapacityError(
                "prompt",
                f"has {seq.num_prompt} tokens; with one new token, {what} holds at most {limit - 1}. "
                f"Shorten it, or set truncate_prompt_tokens",
            )
        if seq.max_len > limit:
            raise CapacityError(
                "max_tokens",
                f"{seq.max_len - seq.num_prompt} new tokens after a prompt of {seq.num_prompt} are more than the "
                f"{limit} in all that {what} holds; ask for at most {limit - seq.num_prompt}",
            )
        seq.arrival = self._next_arrival
        self._next_arrival += 1
        seq.rank = choose.rank(seq.request, seq.arrival, self.ageing)
        self._sequences[seq.seq_id] = seq
        self._shares.enter(seq.request.tenant)
        if seq.request.deadline is not None:
            heappush(self._deadlines, (seq.request.deadline, seq.arrival, seq.seq_id))
        if (leader := self._leader(seq)) is None:
            insort(self._waiting, seq, key=choose.order)
        else:
            self._followers.setdefault(leader.seq_id, []).append(seq)

    def abort(self, seq_id: str, reason: FinishReason = FinishReason.ABORT) -> list[Event]:
        """End a sequence from outside (cancelled, a stop string found, an error). Unknown ids are ignored.

        No event names it from now on: the caller knows. Tokens of steps in flight are discarded, and its blocks
        return when the last of these steps has. The list is empty but under the static policy, where the last
        of a group to end, even in this way, lets the others go: their withheld `FinishedEvent`s.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.status is Status.ENDED:
            return []
        if seq.status is Status.HELD:
            self._held = [held for held in self._held if held[0] is not seq]
        else:
            self._take_out(seq)
        seq.status, seq.finish_reason = Status.ENDED, reason
        self._give_back(seq)
        return self._let_go()

    def finish(self, seq_id: str, reason: FinishReason = FinishReason.STOP) -> list[Event]:
        """End a sequence as its own last token would: its stop string is complete. Unknown ids are ignored.

        Unlike `abort` it is told: its `FinishedEvent` is among those returned or, under the static policy, comes with
        its group's. Tokens of steps in flight are discarded.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.status not in (Status.RUNNING, Status.WAITING):
            return []
        self._end(seq, reason)
        self._give_back(seq)
        return self._let_go()

    def overdue(self, now: float) -> list[str]:
        """Sequences whose deadline has passed, each named once: whoever asks ends them."""
        late: list[str] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, seq_id = heappop(self._deadlines)
            seq = self._sequences.get(seq_id)
            if seq is not None and seq.arrival == arrival and seq.status in (Status.RUNNING, Status.WAITING):
                late.append(seq_id)
        return late

    # -- the step

    def schedule(self, now: float = 0.0, pace: Pace | None = None) -> StepPlan | None:
        """Plan the next step; None if nothing can advance before a plan in flight retires (or nothing is there).

        There are no phases. Every sequence has `left = known + pending - computed` tokens to feed, and a step advances
        it by min(left, what remains of the step's token budget): a prompt, a chunk of one, the rest after a prefix
        hit, the return after a preemption and a decode step are this one case. The budget goes first to those with
        one token left (the decodes: so a long prompt never holds up the streams beside it), then to the longer rests
        of those already in, then to those who enter; always in order of (priority, arrival), and nobody overtakes
        the head of the queue, which is the first of the tenant served least. Who enters gets blocks for all its known
        tokens at once, so only decodes ever lack a block, and admitted prompts cannot lock each other out. A decode
        that lacks one takes it from the last in order, who goes back to the queue; but if blocks are on their way back
        already (their owners are done, and plans in flight name them) it waits for these. The first in order always
        gets ahead: hence everybody does, in turn. Of n answers to one prompt the others enter once the first has
        computed it, and read it from the prefix cache.

        `now`: seconds on the engine's clock. `pace`: bounds the prompts' share of a step in time as well, as long as
        others decode.
        """
        draft = Draft(self.max_num_batched_tokens, pace)
        rests: list[Sequence] = []
        for seq in self._running.copy():  # preemption shortens the end, never what was passed
            left = seq.num_left
            if left > 1:
                rests.append(seq)
            elif left and draft.budget and seq.status is Status.RUNNING and self._has_block(seq, draft):
                draft.feed(seq)
        for place, seq in enumerate(rests):
            if seq.status is Status.RUNNING:
                draft.feed(seq, others=place + 1 < len(rests) or self._may_enter())
        batch_empty = not (self._running or self._plans)
        for seq in self.policy.entrants(self._waiting, batch_empty, self._shares.served) if self._may_enter() else ():
            if (draft.full and not self.policy.together) or not self._admit(seq, draft, now):
                break
            draft.feed(seq, others=self._may_enter())
        if not draft.items:
            return None
        plan = draft.plan(self._next_step, tuple(self._dropped), tuple(self._preempted))
        self._next_step += 1
        self._dropped.clear()
        self._preempted.clear()
        self._plans.append(plan)
        if len(self._shares.served) > 1:
            for item in plan.items:
                self._shares.charge(self._sequences[item.seq_id].request.tenant, item.num_tokens)
        return plan

    def update(self, plan: StepPlan, tokens: Mapping[str, Seq[int]]) -> list[Event]:
        """Take in the result of the oldest plan in flight: learn, publish, end, give back.

        `tokens[seq_id]`: the one new token of each item that samples. Items of sequences that have ended since (a stop
        found late, `abort`; those of `StepResult.errors` are aborted before) need no entry; what they have is
        discarded. Events are in batch order, the ends last. Raises `RuntimeError` for a plan out of turn.
        """
        if not self._plans or self._plans[0] is not plan:
            expected = self._plans[0].step_id if self._plans else "none"
            raise RuntimeError(f"plans retire in order: step {plan.step_id} given, {expected} expected")
        self._plans.popleft()
        events: list[Event] = []
        for item in plan.items:
            seq = self._sequences[item.seq_id]
            seq.num_in_flight -= 1
            if seq.status in (Status.RUNNING, Status.WAITING):
                # Every id fed is known by now: it was sampled by an older plan.
                self._publish(seq, item.start + item.num_tokens)
                if item.samples:
                    (token,) = tokens[seq.seq_id]
                    seq.num_pending -= 1
                    events.append(TokensEvent(seq.seq_id, (token,)))
                    reason = seq.append(token)
                    if self._followers:
                        self._lead(seq)
                    if reason:
                        self._end(seq, reason, token if reason is FinishReason.STOP else None)
            if not seq.num_in_flight and seq.status is not Status.RUNNING:
                self._give_back(seq)
        return events + self._let_go() if self._held else events

    def check(self) -> None:
        """Recount everything; for tests, and for idle moments. Raises `IntegrityError`."""
        check_scheduler(self)

    # -- entering

    def _leader(self, seq: Sequence) -> Sequence | None:
        """The first answer of the same request, if `seq` waits until that has computed the prompt that they share, to
        read it from the prefix cache; it keeps its place in the order."""
        request, first = seq.request, self._sequences.get(seq.request.seq_id(0))
        if first is None or first.num_known > first.num_prompt:
            return None
        cacheable = seq.num_prompt > self.pool.block_size and request.sampling.prompt_logprobs is None
        lives = first is not seq and first.status in (Status.WAITING, Status.RUNNING)
        return first if lives and cacheable and self.prefix_caching and not self.policy.together else None

    def _lead(self, seq: Sequence) -> None:
        """The prompt of `seq` is computed, or never will be: who follows it may enter."""
        for follower in self._followers.pop(seq.seq_id, ()):
            insort(self._waiting, follower, key=choose.order)

    def _may_enter(self) -> bool:
        return bool(self._waiting and self._free_slots)

    def _admit(self, seq: Sequence, draft: Draft, now: float) -> bool:
        """Let the head of the queue into the batch, whole or not at all.

        Its blocks: those of the longest cached prefix, and new ones for all its other known tokens. A block for
        each of those who run stays free, and at least the watermark: with less, somebody would soon be preempted,
        and what was gained by entering is lost by computing twice. A sequence that wants log-probabilities of its
        prompt computes all that predicts them, also after a preemption (rows may then come twice).
        """
        if seq.num_in_flight or not self._free_slots:
            return False
        request, readable = seq.request, seq.token_ids
        if request.sampling.prompt_logprobs is not None:
            readable = readable[: request.prompt_logprobs_from]  # the row before that position must be computed
        hits = self.pool.match(seq.prefixes, readable) if self.prefix_caching else []
        spare = max(self.watermark, len(self._running)) if self._running else 0
        table = self.pool.acquire(self.pool.blocks_for(seq.num_known) - len(hits), hits, spare)
        if table is None:
            return False
        seq.block_table = tuple(table)
        seq.num_published = len(hits)
        seq.num_computed = len(hits) * self.pool.block_size
        self.num_hit_tokens += seq.num_computed
        seq.slot = heappop(self._free_slots)
        seq.status = Status.RUNNING
        _remove(self._waiting, seq)
        insort(self._running, seq, key=choose.order)
        draft.enter(seq, now)
        return True

    # -- memory

    def _has_block(self, seq: Sequence, draft: Draft) -> bool:
        """Whether the next position of `seq` has a block: its own, a free one, or one taken from another.

        False: `seq` sits this step out, because enough blocks return with the plans in flight (preempting more
        would free nothing sooner), or because it is the last in order.
        """
        if seq.num_computed < len(seq.block_table) * self.pool.block_size:
            return True
        while (block := self.pool.acquire(1)) is None:
            if draft.returning is None:
                draft.returning = self.pool.num_returning(self._leaving_tables())
            if draft.returning > draft.claimed:
                draft.claimed += 1
                return False
            victim = choose.victim(self._running, seq)
            if victim is None:
                return False
            self._preempt(victim)
            draft.returning = None
        seq.block_table += tuple(block)
        return True

    def _leaving_tables(self) -> list[tuple[int, ...]]:
        """Block tables that come back with the plans in flight: of those who are out of the batch but still named
        by plans, and of those whose last token is on its way."""
        named = {item.seq_id for plan in self._plans for item in plan.items}
        sequences = [self._sequences[seq_id] for seq_id in named]
        return [seq.block_table for seq in sequences if seq.status is not Status.RUNNING or not seq.num_left]

    def _preempt(self, seq: Sequence) -> None:
        """Back to its place in the queue. It keeps every token, also those in flight, and computes them again."""
        _remove(self._running, seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.append(seq.seq_id)
        insort(self._waiting, seq, key=choose.order)
        self._give_back(seq)

    def _publish(self, seq: Sequence, num_written: int) -> None:
        """Offer the blocks that are full now to others; positions 0 .. num_written - 1 are written."""
        while self.prefix_caching and (seq.num_published + 1) * self.pool.block_size <= num_written:
            i = seq.num_published
            self.pool.publish(seq.block_table[i], seq.prefixes, seq.token_ids, i)
            seq.num_published += 1

    # -- leaving

    def _end(self, seq: Sequence, reason: FinishReason, stop: int | None = None) -> None:
        """End a sequence in the batch, or in the queue if it was preempted with this step in flight."""
        self._take_out(seq)
        seq.status, seq.finish_reason = Status.HELD, reason
        self._held.append((seq, FinishedEvent(seq.seq_id, reason, stop)))

    def _take_out(self, seq: Sequence) -> None:
        """Of the batch or of the queue."""
        self._lead(seq)
        followers = self._followers.get(seq.request.seq_id(0), [])
        if seq in followers:
            followers.remove(seq)
        else:
            _remove(self._running if seq.status is Status.RUNNING else self._waiting, seq)

    def _let_go(self) -> list[Event]:
        """End those who are held: at once, or under `static` when the last of the group is done."""
        if not self._held or not self.policy.may_leave(self._waiting, self._running):
            return []
        held, self._held = self._held, []
        for seq, _ in held:
            seq.status = Status.ENDED
            self._give_back(seq)
        return [event for _, event in held]

    def _give_back(self, seq: Sequence) -> None:
        """Take from a sequence outside the batch what it needs no longer, once no plan in flight names it."""
        if seq.num_in_flight:
            return
        self.pool.release(seq.block_table)
        seq.block_table = ()
        seq.num_computed = 0
        if seq.status is Status.HELD:
            return
        if seq.slot >= 0:
            heappush(self._free_slots, seq.slot)
            seq.slot = -1
        if seq.status is Status.ENDED:
            del self._sequences[seq.seq_id]
            self._shares.leave(seq.request.tenant)
            if seq.admitted_at is not None:  # the runner has heard of it
                self._dropped.append(seq.seq_id)


def _remove(queue: list[Sequence], seq: Sequence) -> None:
    """Delete from a queue sorted by `order`."""
    del queue[bisect_left(queue, choose.order(seq), key=choose.order)]
