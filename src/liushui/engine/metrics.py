"""Numbers from the event log: pure functions, nothing else is measured anywhere.

Definitions:

- output tokens/s: tokens of all answers / (end of the last step - start of the first).
- TTFT: arrival to first token. Completion time: arrival to leaving the batch, which under the static policy is when
  the whole group is done. p99 by linear interpolation between order statistics (numpy's default).
- wasted slots: slots = the number of different slots that were ever used. In each step, a slot is used if a live
  sequence in it was advanced (a prompt chunk counts, and a recomputation after preemption); it is wasted if it is
  empty, held by a sequence that has ended, or passed over in this step. The share is weighted with the steps'
  durations, from the first step to the last finish; time in which no step ran is not counted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from liushui.core.request import FinishReason
from liushui.engine.events import EventLog, Kind, SequenceEvent, StepRecord
from liushui.engine.outputs import RequestTimings


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers. Times in seconds; None where nothing happened to be measured."""

    policy: str
    requests: int
    """Requests that arrived."""
    failed: int
    """Answers that ended with an error or were aborted."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache, at first admission."""
    output_tokens: int
    seconds: float
    """First step's start to last step's end."""
    output_tokens_per_second: float | None
    mean_ttft: float | None
    p99_ttft: float | None
    mean_completion: float | None
    p99_completion: float | None
    mean_inter_token: float | None
    steps: int
    mean_batch: float | None
    """Live sequences advanced per step, weighted with the steps' durations."""
    wasted_slots: float | None
    """Share of slot-time, 0 .. 1."""
    preemptions: int

    def lines(self) -> list[str]:
        """For a person, one line per group of numbers."""
        tokens = f"{self.output_tokens:,} output tokens in {self.seconds:.2f} s"
        if self.output_tokens_per_second is not None:
            tokens += f" = {self.output_tokens_per_second:,.1f} tokens/s"
        return [
            f"{self.policy}: {self.requests:,} requests, {self.failed:,} answers failed, {tokens}",
            f"time to first token: mean {_seconds(self.mean_ttft)}, p99 {_seconds(self.p99_ttft)}; "
            f"completion: mean {_seconds(self.mean_completion)}, p99 {_seconds(self.p99_completion)}; "
            f"between tokens: mean {_seconds(self.mean_inter_token)}",
            f"{self.steps:,} steps, {self.mean_batch or 0:.1f} sequences advanced per step, "
            f"{(self.wasted_slots or 0) * 100:.1f}% of slot-time wasted, {self.preemptions:,} preemptions, "
            f"{self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens from the prefix cache",
        ]


def summarize(log: EventLog) -> Summary:
    """All numbers of a log, or of a part of it (`EventLog.since`)."""
    timings = list(request_timings(log).values())
    finished = [event for event in log.events if event.kind is Kind.FINISHED]
    first_admissions = {e.seq_id: e.value for e in reversed(log.events) if e.kind is Kind.ADMITTED}
    tokens = sum(event.value for event in finished)
    seconds = max(s.end for s in log.steps) - log.steps[0].start if log.steps else 0.0
    first = [t.time_to_first_token for t in timings if t.time_to_first_token is not None]
    total = [t.total for t in timings if t.total is not None]
    return Summary(
        policy=log.house.policy,
        requests=sum(event.kind is Kind.ARRIVED for event in log.events),
        failed=sum(event.reason in (FinishReason.ERROR, FinishReason.ABORT) for event in finished),
        prompt_tokens=sum(event.value for event in log.events if event.kind is Kind.ARRIVED),
        cached_tokens=sum(first_admissions.values()),
        output_tokens=tokens,
        seconds=seconds,
        output_tokens_per_second=tokens / seconds if seconds else None,
        mean_ttft=mean(first),
        p99_ttft=quantile(first, 0.99),
        mean_completion=mean(total),
        p99_completion=quantile(total, 0.99),
        mean_inter_token=mean([t.inter_token for t in timings if t.inter_token is not None]),
        steps=len(log.steps),
        mean_batch=mean_batch(log),
        wasted_slots=wasted_slots(log),
        preemptions=sum(event.kind is Kind.PREEMPTED for event in log.events),
    )


def request_timings(log: EventLog) -> dict[str, RequestTimings]:
    """Timings of each request whose arrival is in the log, the same as on its `RequestOutput`."""
    events: dict[str, list[SequenceEvent]] = defaultdict(list)
    owner: dict[str, str] = {}
    for event in log.events:
        events[event.request_id].append(event)
        if event.kind is not Kind.ARRIVED:
            owner[event.seq_id] = event.request_id
    steps: dict[str, int] = defaultdict(int)
    mates: dict[str, int] = defaultdict(int)
    last_step = last_steps(log)
    for step in log.steps:
        for item in step.items:
            if item.seq_id in owner and step.step_id <= last_step.get(item.seq_id, step.step_id):
                steps[owner[item.seq_id]] += 1
                mates[owner[item.seq_id]] += len(step.items) - 1
    return {
        request_id: _timings(own, steps[request_id], mates[request_id])
        for request_id, own in events.items()
        if own[0].kind is Kind.ARRIVED
    }


def _timings(events: Sequence[SequenceEvent], steps: int, mates: int) -> RequestTimings:
    def times(kind: Kind) -> Iterator[float]:
        return (event.time for event in events if event.kind is kind)

    ends = [event for event in events if event.kind is Kind.FINISHED]
    answers = max(len({event.seq_id for event in events if event.kind is not Kind.ARRIVED}), 1)
    return RequestTimings(
        arrival=events[0].time,
        scheduled=min(times(Kind.ADMITTED), default=None),
        first_token=min(times(Kind.FIRST_TOKEN), default=None),
        last_token=max((end.last_token for end in ends if end.last_token is not None), default=None),
        finished=max(times(Kind.FINISHED)) if len(ends) == answers else None,
        preemptions=sum(event.kind is Kind.PREEMPTED for event in events),
        steps=steps,
        output_tokens=sum(end.value for end in ends),
        answers=answers,
        preempted=_preempted(events),
        mates=mates,
    )


def _preempted(events: Sequence[SequenceEvent]) -> float:
    """Seconds between giving up the blocks and coming back, or the end, summed in the order of the sequences."""
    since: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for event in events:
        if event.kind is Kind.PREEMPTED:
            since[event.seq_id] = event.time
        elif event.kind in (Kind.ADMITTED, Kind.FINISHED) and event.seq_id in since:
            out = event.time - since.pop(event.seq_id)
            seconds[event.seq_id] = seconds.get(event.seq_id, 0.0) + out
    return sum(seconds[seq_id] for seq_id in sorted(seconds, key=_answer_index))


def _answer_index(seq_id: str) -> int:
    index = seq_id.rpartition("/")[2]
    return int(index) if "/" in seq_id else 0


def last_steps(log: EventLog) -> dict[str, int]:
    """Sequence -> the last step that advanced it; only of those that have finished."""
    return {event.seq_id: event.step_id for event in log.events if event.kind is Kind.FINISHED}


def durations(steps: Iterable[StepRecord]) -> Iterator[float]:
    """Seconds of each step; of the overlap of two steps in flight the earlier one has all."""
    free_from = float("-inf")
    for step in steps:
        yield max(step.end - max(step.start, free_from), 0.0)
        free_from = max(free_from, step.end)


def live_items(step: StepRecord, last_step: Mapping[str, int]) -> int:
    """Sequences that the step advanced and that had not ended before it."""
    return sum(step.step_id <= last_step.get(item.seq_id, step.step_id) for item in step.items)


def mean_batch(log: EventLog) -> float | None:
    """Live sequences advanced per step, weighted with the steps' durations."""
    advanced, seconds = _advanced(log, log.steps)
    return advanced / seconds if seconds else None


def wasted_slots(log: EventLog) -> float | None:
    """Share of slot-time that advanced no live sequence, as defined above."""
    end = max((event.time for event in log.events if event.kind is Kind.FINISHED), default=float("inf"))
    steps = [step for step in log.steps if step.start <= end]
    slots = len({item.slot for step in steps for item in step.items})
    advanced, seconds = _advanced(log, steps)
    return 1.0 - advanced / (seconds * slots) if seconds and slots else None


def _advanced(log: EventLog, steps: Sequence[StepRecord]) -> tuple[float, float]:
    """(sequence-seconds advanced, seconds)."""
    last_step = last_steps(log)
    weighted = [
        (live_items(step, last_step) * seconds, seconds) for step, seconds in zip(steps, durations(steps), strict=True)
    ]
    return sum(advanced for advanced, _ in weighted), sum(seconds for _, seconds in weighted)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def quantile(values: Sequence[float], q: float) -> float | None:
    """Linear interpolation between order statistics; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
