"""The event log: what happened, appended once, in order. Metrics, timings and pictures are derived from it.

    requests    arrived ... admitted ... first_token ... (preempted ... admitted)* ... finished
    steps       who sat in which slot in which step, what was fed, and how full the house was

Times are seconds on the engine's clock. Writing costs one append of a tuple; nothing is computed here.
"""

import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, overload

from liushui.core.plan import StepPlan
from liushui.core.request import FinishReason


class Kind(StrEnum):
    ARRIVED = "arrived"
    """value: its prompt tokens."""
    ADMITTED = "admitted"
    """It entered the batch, for the first time or after a preemption. value: tokens found in the prefix cache."""
    FIRST_TOKEN = "first_token"  # noqa: S105 (no secret)
    PREEMPTED = "preempted"
    """It gave up its KV blocks and waits to be computed again."""
    FINISHED = "finished"
    """It left the batch. value: its output tokens; `reason`; `step_id`: the last step that advanced it, -1 if none."""


class SequenceEvent(NamedTuple):
    kind: Kind
    time: float
    request_id: str
    seq_id: str
    """The request's id, or "id/i" for answer i of several."""
    value: int = 0
    step_id: int = -1
    """The step it belongs to."""
    reason: FinishReason | None = None
    last_token: float | None = None
    """FINISHED: when its last token came."""


class StepItem(NamedTuple):
    seq_id: str
    slot: int
    start: int
    """First position fed."""
    num_tokens: int
    samples: bool
    """Whether it gave a new token (False inside a prompt's chunks)."""


class Items(Sequence[StepItem]):
    """The items of a step in 16 to 24 bytes each (named tuples take 130): a night's log must fit in memory."""

    __slots__ = ("_numbers", "seq_ids")

    def __init__(self, plan: StepPlan, seq_ids: tuple[str, ...] = ()) -> None:
        """`seq_ids`: those of the step before, to be shared if nobody came or went."""
        own = tuple([item.seq_id for item in plan.items])
        self.seq_ids = seq_ids if own == seq_ids else own
        self._numbers = array("I")
        for item in plan.items:
            self._numbers.extend((item.slot, item.start, item.num_tokens, item.samples))

    def __len__(self) -> int:
        return len(self.seq_ids)

    @overload
    def __getitem__(self, place: int) -> StepItem: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[StepItem]: ...
    def __getitem__(self, place: int | slice) -> StepItem | Sequence[StepItem]:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[StepItem]:
        numbers = iter(self._numbers)
        for seq_id, slot, start, count, samples in zip(self.seq_ids, numbers, numbers, numbers, numbers, strict=True):
            yield StepItem(seq_id, slot, start, count, bool(samples))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class StepRecord(NamedTuple):
    step_id: int
    start: float
    """Handed to the executor."""
    end: float
    """Result there. With steps in flight the next may have started before."""
    items: Sequence[StepItem]
    waiting: int
    """Sequences left in the queue when the step was planned."""
    running: int
    """Sequences that hold a slot then."""
    free_blocks: int
    """KV blocks nobody owns then, cached ones included."""


@dataclass(frozen=True, slots=True)
class House:
    """What stays fixed: the scale of the log's numbers."""

    policy: str = "continuous"
    max_num_seqs: int = 0
    num_blocks: int = 0
    block_size: int = 0


class Mark(NamedTuple):
    """A place in the log."""

    events: int
    steps: int


class EventLog:
    """Append-only. `limit` keeps only the newest that many events and as many steps (for servers)."""

    def __init__(self, house: House | None = None, *, limit: int | None = None) -> None:
        self.house = house or House()
        self.limit = limit
        self.events: MutableSequence[SequenceEvent] = [] if limit is None else deque(maxlen=limit)
        self.steps: MutableSequence[StepRecord] = [] if limit is None else deque(maxlen=limit)
        self._total = Mark(0, 0)
        self._seq_ids: tuple[str, ...] = ()

    def add(self, event: SequenceEvent) -> None:
        self.events.append(event)
        self._total = Mark(self._total.events + 1, self._total.steps)

    def add_step(self, plan: StepPlan, start: float, end: float, waiting: int, running: int, free_blocks: int) -> None:
        items = Items(plan, self._seq_ids)
        self._seq_ids = items.seq_ids
        self.steps.append(StepRecord(plan.step_id, start, end, items, waiting, running, free_blocks))
        self._total = Mark(self._total.events, self._total.steps + 1)

    def mark(self) -> Mark:
        """Where the log ends now; see `since`."""
        return self._total

    @property
    def forgotten(self) -> Mark:
        """How much the limit has dropped."""
        return Mark(self._total.events - len(self.events), self._total.steps - len(self.steps))

    def since(self, mark: Mark) -> "EventLog":
        """A log of what came after `mark` (less what the limit dropped)."""
        gone = self.forgotten
        part = EventLog(self.house)
        part.events = list(self.events)[max(mark.events - gone.events, 0) :]
        part.steps = list(self.steps)[max(mark.steps - gone.steps, 0) :]
        part._total = Mark(len(part.events), len(part.steps))
        return part

    def save(self, path: Path) -> None:
        """Write as JSON lines: the house, then one event or step per line."""
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in self._lines())

    def _lines(self) -> Iterable[dict[str, Any]]:
        yield {"house": asdict(self.house)}
        for event in self.events:
            yield {"event": {key: value for key, value in event._asdict().items() if value is not None}}
        for step in self.steps:
            yield {"step": step._asdict() | {"items": list(step.items)}}

    @classmethod
    def read(cls, path: Path) -> "EventLog":
        """The log that `save` wrote."""
        log = cls()
        with path.open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                if "house" in line:
                    log.house = House(**line["house"])
                elif "event" in line:
                    fields = dict(line["event"], kind=Kind(line["event"]["kind"]))
                    if "reason" in fields:
                        fields["reason"] = FinishReason(fields["reason"])
                    log.events.append(SequenceEvent(**fields))
                else:
                    items = tuple(StepItem(*item) for item in line["step"]["items"])
                    log.steps.append(StepRecord(**dict(line["step"], items=items)))
        log._total = Mark(len(log.events), len(log.steps))
        return log
