"""A world for the scheduler: an executor whose every token is known beforehand, and a loop of any depth.

`token_at(seq_id, position)` is the whole model. So whatever the schedule, a sequence must get the tokens of
`expected(seq)`: whoever shares its batch, however its prompt is cut, wherever it is preempted.

The executor keeps a KV memory of cells (token, position, hash of all before and of the salt). A step writes the
cells it feeds and then reads, for every item, all cells from position 0: a stale, early or wrongly shared block
cannot hold the right ones.
"""

from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from zlib import crc32

from liushui.core.blocks import BlockPool
from liushui.core.cost import FLOOR, Pace
from liushui.core.plan import FinishedEvent, PlanItem, StepPlan, TokensEvent
from liushui.core.policy import order
from liushui.core.request import FinishReason, Request, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence, Status

EOS = 0
VOCABULARY = 12
OF_REQUEST = ("priority", "cache_salt", "prompt_logprobs_from", "tenant", "arrival_time", "deadline")


def token_at(seq_id: str, position: int) -> int:
    return crc32(f"{seq_id}@{position}".encode()) % VOCABULARY


def first_token(name: str, num_prompt: int) -> int:
    return token_at(name, num_prompt)


def expected(seq: Sequence) -> tuple[list[int], FinishReason]:
    """The answer and how it ends, by the words of the parameters and nothing of the scheduler's code."""
    request, sampling = seq.request, seq.request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else request.eos_token_ids)
    answer: list[int] = []
    while len(answer) < request.max_tokens:
        token = token_at(seq.seq_id, len(request.prompt_token_ids) + len(answer))
        answer.append(token)
        if token in stops and len(answer) > sampling.min_tokens:
            return answer, FinishReason.STOP
    return answer, FinishReason.LENGTH


def make(name: str, prompt: list[int] | int, max_tokens: int = 4, **keys: object) -> Sequence:
    """A sequence; a prompt given as a number has that many tokens, unlike any other's."""
    if isinstance(prompt, int):
        prompt = [1000 + crc32(f"{name}#{i}".encode()) % 100_000 for i in range(prompt)]
    of_request = {key: keys.pop(key) for key in OF_REQUEST if key in keys}
    keys.setdefault("ignore_eos", True)
    sampling = SamplingParams(max_tokens=max_tokens, **keys)
    return Sequence(
        Request(
            name,
            tuple(prompt),
            sampling,
            seed=5,
            max_tokens=max_tokens,
            eos_token_ids=frozenset({EOS}),
            **of_request,
        )
    )


@dataclass
class Known:
    """What the device knows of a sequence: all its tokens so far, and the hash of each prefix."""

    ids: list[int]
    hashes: list[int]

    def learn(self, token: int) -> None:
        self.ids.append(token)
        self.hashes.append(hash((self.hashes[-1], token)))


@dataclass
class Device:
    """Runs plans in order and at once; refuses whatever an honest device could not run."""

    block_size: int
    salts: dict[str, str] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    written_in: dict[tuple[int, int], int] = field(default_factory=dict)

    def run(self, plan: StepPlan, num_retired: int) -> dict[str, list[int]]:
        """The tokens of one step; the first `num_retired` steps have been updated already."""
        for seq_id in plan.dropped:
            del self.known[seq_id]
        for new in plan.new:
            assert new.seq_id not in self.known, "introduced twice"
            self.known[new.seq_id] = Known([], [hash(self.salts[new.seq_id])])
            for token in new.prompt_token_ids:
                self.known[new.seq_id].learn(token)
        entered = {seq_id for seq_id, _ in plan.admitted}
        for item in plan.items:
            if item.seq_id in entered:  # what it finds in the cache was written by a step that has retired
                for position in range(item.start):
                    assert self.written_in[self.place(item, position)] < num_retired
            self.write(plan, item)
        for item in plan.items:
            self.read(item)
        return {item.seq_id: [self.sample(item)] for item in plan.items if item.samples}

    def place(self, item: PlanItem, position: int) -> tuple[int, int]:
        return item.block_table[position // self.block_size], position % self.block_size

    def write(self, plan: StepPlan, item: PlanItem) -> None:
        known, end = self.known[item.seq_id], item.start + item.num_tokens
        fed = list(item.token_ids)
        if len(fed) < item.num_tokens:  # the last id is in flight: it must be the one sampled last
            assert end == len(known.ids)
            fed.append(known.ids[-1])
        assert fed == known.ids[item.start : end], "fed other tokens than its own"
        for position in range(item.start, end):
            place = self.place(item, position)
            self.cells[place] = (known.ids[position], position, known.hashes[position])
            self.written_in[place] = plan.step_id

    def read(self, item: PlanItem) -> None:
        known = self.known[item.seq_id]
        for position in range(item.start + item.num_tokens):
            cell = (known.ids[position], position, known.hashes[position])
            assert self.cells[self.place(item, position)] == cell, f"{item.seq_id} reads a wrong {position}"

    def sample(self, item: PlanItem) -> int:
        known, position = self.known[item.seq_id], item.start + item.num_tokens
        assert position == len(known.ids), "sampled twice, or before its prompt ends"
        known.learn(token_at(item.seq_id, position))
        return known.ids[-1]


class WatchedPool(BlockPool):
    """Knows how many blocks were owned at once."""

    most_owned = 0

    def acquire(self, num_new: int, hits: Seq[int] = (), spare: int = 0) -> list[int] | None:
        blocks = super().acquire(num_new, hits, spare)
        self.most_owned = max(self.most_owned, self.num_blocks - self.num_free)
        return blocks


class RecklessPool(WatchedPool):
    """Keeps nothing spare for those who run, so that they are preempted all the time."""

    def acquire(self, num_new: int, hits: Seq[int] = (), spare: int = 0) -> list[int] | None:
        return super().acquire(num_new, hits)


class World:
    """A scheduler, a device, and up to `depth` plans in flight beside the one at hand; all checked at each call."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        depth: int = 0,
        reckless: bool = False,
        pace: Pace | None = None,
        cache_room: int | None = None,
        **settings: object,
    ) -> None:
        self.depth = depth
        self.pace = pace
        self.pool = (RecklessPool if reckless else WatchedPool)(num_blocks, block_size, cache_room)
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 4096}
        self.scheduler = Scheduler(self.pool, **{**limits, **settings})
        self.device = Device(block_size)
        self.sequences: dict[str, Sequence] = {}
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, FinishedEvent] = {}
        self.aborted: set[str] = set()
        self.cut: set[str] = set()
        self.late: set[str] = set()
        self.in_flight: deque[tuple[StepPlan, dict[str, list[int]]]] = deque()
        self.plans: list[StepPlan] = []
        self.num_retired = 0
        self.seen: Counter[str] = Counter()

    def add(self, *sequences: Sequence) -> None:
        for seq in sequences:
            self.device.salts[seq.seq_id] = seq.request.cache_salt
            self.scheduler.add(seq)
            self.sequences[seq.seq_id] = seq
            self.answers[seq.seq_id] = []
        self.scheduler.check()

    def abort(self, seq_id: str) -> None:
        if seq_id in self.sequences and seq_id not in self.finished:
            self.aborted.add(seq_id)
        self.take(self.scheduler.abort(seq_id))
        self.scheduler.check()

    def finish(self, seq_id: str) -> None:
        """As when a stop string is complete. Nothing happens to a sequence that has ended (or is held)."""
        seq = self.sequences.get(seq_id)
        if seq and seq.status in (Status.WAITING, Status.RUNNING):
            self.cut.add(seq_id)
        self.take(self.scheduler.finish(seq_id))
        self.scheduler.check()

    def schedule(self) -> StepPlan | None:
        now = float(len(self.plans))
        for seq_id in self.scheduler.overdue(now):
            assert self.sequences[seq_id].request.deadline <= now
            assert seq_id not in self.late, "named twice"
            self.late.add(seq_id)
            self.abort(seq_id)
        first = next((seq for seq in self.scheduler._running if seq.num_left), None)
        plan = self.scheduler.schedule(now, self.pace)
        self.scheduler.check()
        self.seen["in flight when preempted"] += any(seq.num_in_flight for seq in self.scheduler._waiting)
        if first and not self.in_flight:
            assert plan, "the first in order stands still"
            assert first.seq_id in {item.seq_id for item in plan.items}, "the first in order stands still"
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "stuck"
            return None
        assert plan.step_id == len(self.plans)
        self.check_plan(plan)
        self.in_flight.append((plan, self.device.run(plan, self.num_retired)))
        self.plans.append(plan)
        return plan

    def update(self) -> None:
        plan, tokens = self.in_flight.popleft()
        events = self.scheduler.update(plan, tokens)
        self.num_retired += 1
        self.scheduler.check()
        self.take(events)
        self.seen["late stops"] += any(self.sequences[i].num_in_flight for i in self.finished)

    def take(self, events: list[object]) -> None:
        for event in events:
            assert event.seq_id not in self.aborted, "an event of an aborted sequence"
            assert event.seq_id not in self.finished, "an event after the end"
            if isinstance(event, TokensEvent):
                assert event.seq_id not in self.cut, "tokens after the end"
                self.answers[event.seq_id] += event.token_ids
            else:
                self.finished[event.seq_id] = event

    def step(self) -> StepPlan | None:
        """One turn of the loop: schedule ahead, then take in the oldest result once `depth` others follow it."""
        plan = self.schedule()
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.update()
        return plan

    def run(self, max_steps: int = 5000) -> "World":
        """To the end; everybody has exactly the expected answer and nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "still at work"
        assert self.finished.keys() | self.aborted == self.sequences.keys()
        for seq_id, event in self.finished.items():
            answer, reason = expected(self.sequences[seq_id])
            if seq_id in self.cut:
                assert event == FinishedEvent(seq_id, FinishReason.STOP)
                assert self.answers[seq_id] == answer[: len(self.answers[seq_id])]
                continue
            assert self.answers[seq_id] == answer
            assert event.reason is reason
            assert event.stop_token_id == (answer[-1] if reason is FinishReason.STOP else None)
        for seq_id in self.aborted:
            answer = self.answers[seq_id]
            assert answer == expected(self.sequences[seq_id])[0][: len(answer)]
        assert self.pool.num_free == self.pool.num_blocks
        assert self.pool.most_owned <= self.pool.num_used <= max(self.pool.cache_room, self.pool.most_owned)
        self.scheduler.check()
        return self

    def check_plan(self, plan: StepPlan) -> None:
        scheduler, items = self.scheduler, plan.items
        assert 0 < plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len({item.seq_id for item in items}) == len(items)
        in_order = [self.sequences[item.seq_id] for item in items]
        entered = {seq_id for seq_id, _ in plan.admitted}  # among several tenants in the order of their shares
        stayed = [(seq, item) for seq, item in zip(in_order, items, strict=True) if seq.seq_id not in entered]
        decodes = [order(seq) for seq, item in stayed if item.num_tokens == 1 and item.samples]
        assert decodes == sorted(decodes)
        waiting = [seq for seq in scheduler._waiting if scheduler.policy.together <= bool(seq.num_preemptions)]
        for seq_id, _ in plan.admitted:
            own = [seq for seq in waiting if seq.request.tenant == self.sequences[seq_id].request.tenant]
            assert all(order(self.sequences[seq_id]) < order(seq) for seq in own), "overtaken in the queue"
        if self.pace is not None and not scheduler.policy.together:
            self.check_pace(items)
        # Slots and blocks: nobody else's in this plan or in any plan in flight, but blocks that all only read.
        named = [*items, *(item for earlier, _ in self.in_flight for item in earlier.items)]
        size = self.pool.block_size
        for item in items:
            others = [other for other in named if other.seq_id != item.seq_id]
            assert item.slot not in {other.slot for other in others}
            last = item.start + item.num_tokens - 1
            written = set(item.block_table[item.start // size : last // size + 1])
            assert len(item.block_table) > last // size
            for other in others:
                assert not written & set(other.block_table), f"{item.seq_id} writes what {other.seq_id} owns"

    def check_pace(self, items: Seq[PlanItem]) -> None:
        """Beside decodes, prompts get what the pace allows and no more, and the first of them always something."""
        decodes = [item for item in items if item.num_tokens == 1]
        rests = [item for item in items if item.num_tokens > 1]
        if decodes and decodes[0] is items[0] and rests:
            assert sum(item.num_tokens for item in rests) <= max(self.pace.longest, FLOOR)

    def batch(self) -> list[str]:
        """Who has a slot, by slot."""
        live = [seq for seq in self.sequences.values() if seq.slot >= 0 and seq.status is not Status.ENDED]
        return [seq.seq_id for seq in sorted(live, key=lambda seq: seq.slot)]


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    """A plan as (sequence, start, number of tokens)."""
    return [] if plan is None else [(item.seq_id, item.start, item.num_tokens) for item in plan.items]
