"""A step plan while it is being made."""

from liushui.core.cost import Pace, Work
from liushui.core.plan import NewSequence, PlanItem, StepPlan
from liushui.core.sequence import Sequence

_NO_WORK = Work()


class Draft:
    """One step's budget, in tokens and in time, its items, and its count of missing blocks."""

    __slots__ = ("admitted", "budget", "claimed", "decoding", "items", "new", "pace", "returning", "work")

    def __init__(self, budget: int, pace: Pace | None = None) -> None:
        self.budget = budget
        """Tokens that may still be fed."""
        self.pace = pace
        """Bounds the prompts' share in time."""
        self.work = _NO_WORK
        self.decoding = _NO_WORK
        """Of `work`, that of sequences with one token: they are fed first, and always."""
        self.items: list[PlanItem] = []
        self.new: list[NewSequence] = []
        self.admitted: list[tuple[str, int]] = []
        self.returning: int | None = None
        """Blocks that return with the plans in flight. None: to be counted."""
        self.claimed = 0
        """Sequences that wait for one of these."""

    @property
    def full(self) -> bool:
        """Whether nobody else can be fed."""
        return not self.budget or (self.pace is not None and not self.pace.chunk(self.decoding, self.work, 0))

    def feed(self, seq: Sequence, others: bool = False) -> None:
        """Advance `seq` by what it has left, within the budget: positions start .. end - 1.

        `others`: more prompts come after it. Then it takes at most half of the time that is left for prompts, so that
        a short one is not kept waiting until a long one before it is done.

        Ids known at start .. min(end, num_known) - 1 go along. At most the last one is in flight, since nothing
        is sampled before all that is known or pending is fed.
        """
        start = seq.num_computed
        num_tokens = min(seq.num_left, self.budget)
        if self.pace is not None and num_tokens > 1:
            chunk = self.pace.chunk(self.decoding, self.work, start)
            num_tokens = min(num_tokens, chunk - chunk // 2 if others else chunk)
        if not num_tokens:
            return
        if self.pace is not None:
            self.work = self.work.plus(start, num_tokens)
            if num_tokens == 1 and not self.work.prompt_tokens:
                self.decoding = self.work
        end = start + num_tokens
        samples = end == seq.num_total
        self.items.append(
            PlanItem(
                seq.seq_id,
                seq.slot,
                start,
                num_tokens,
                tuple(seq.token_ids[start:end]),
                seq.block_table,
                samples,
            )
        )
        self.budget -= num_tokens
        seq.num_computed = end
        seq.num_pending += samples
        seq.num_in_flight += 1

    def enter(self, seq: Sequence, now: float) -> None:
        """Announce an admission; the first one with all that the runner must know."""
        num_cached = min(seq.num_computed, seq.num_prompt)
        self.admitted.append((seq.seq_id, num_cached))
        if seq.admitted_at is not None:
            return
        seq.admitted_at = now
        seq.num_cached = num_cached
        request = seq.request
        self.new.append(
            NewSequence(
                seq.seq_id,
                request.prompt_token_ids,
                request.sampling,
                seq.seed,
                seq.stop_token_ids,
                request.prompt_logprobs_from,
            )
        )

    def plan(self, step_id: int, dropped: tuple[str, ...], preempted: tuple[str, ...]) -> StepPlan:
        return StepPlan(step_id, tuple(self.items), tuple(self.new), dropped, tuple(self.admitted), preempted)
