"""Why did my request wait? An answer in seconds, from the event log alone."""

from dataclasses import dataclass

from liushui.engine.events import EventLog, Kind, SequenceEvent, StepRecord
from liushui.engine.metrics import durations


@dataclass(frozen=True, slots=True)
class Wait:
    """Where one request's time went. Seconds, unless said otherwise. For n > 1: of the answer that came first."""

    request_id: str
    prompt_tokens: int
    slots_full: float
    """Queued, and every slot was taken."""
    group: float
    """Queued behind the group at the table (static policy)."""
    blocks_short: float
    """Queued, a slot was free, but its prompt did not fit in the KV cache."""
    in_line: float
    """Queued, with room: others came before it, or the step's tokens were spent."""
    between_steps: float
    """Queued while no step ran."""
    left_before: int
    """Sequences that finished while it was queued."""
    prefill: float | None
    """Entering the batch to the first token; None: there was none."""
    prefill_steps: int
    passed_over: int
    """Steps in that time that fed it nothing: the tokens were spent on others."""
    decode: float | None
    """First token to the end."""
    preemptions: int
    cached_tokens: int

    @property
    def queued(self) -> float:
        return self.slots_full + self.group + self.blocks_short + self.in_line + self.between_steps

    def lines(self) -> list[str]:
        """For a person."""
        reasons = {
            "all slots were taken": self.slots_full,
            "the group before it was still at the table": self.group,
            "the KV cache had no room for its prompt": self.blocks_short,
            "others were before it in the queue": self.in_line,
            "no step was running": self.between_steps,
        }
        known = [f"{seconds:.3f} s because {reason}" for reason, seconds in reasons.items() if seconds > 0]
        lines = [f"{self.request_id} was queued {self.queued:.3f} s" + (": " if known else "") + ", ".join(known)]
        if self.left_before:
            lines.append(f"{self.left_before:,} sequences finished in that time")
        if self.prefill is not None:
            lines.append(
                f"its prompt ({self.prompt_tokens:,} tokens, {self.cached_tokens:,} cached) took {self.prefill:.3f} s "
                f"in {self.prefill_steps} steps; {self.passed_over} steps fed only others"
            )
        if self.decode is not None:
            lines.append(f"its answer took {self.decode:.3f} s")
        if self.preemptions:
            lines.append(f"it was preempted {self.preemptions} times")
        return lines


def explain_wait(log: EventLog, request_id: str) -> Wait | None:
    """Account for the time of one request; None if the log has no arrival of it."""
    own = [event for event in log.events if event.request_id == request_id]
    arrival = next((event for event in own if event.kind is Kind.ARRIVED), None)
    if arrival is None:
        return None
    admitted = next((event for event in own if event.kind is Kind.ADMITTED), None)
    finished = max((event.time for event in own if event.kind is Kind.FINISHED), default=None)
    now = log.steps[-1].end if log.steps else arrival.time
    until = admitted.time if admitted else finished if finished is not None else max(now, arrival.time)
    queued = _queued(log, arrival, until)
    first = next((event for event in own if event.kind is Kind.FIRST_TOKEN), None)
    fed, passed = (0, 0) if first is None or admitted is None else _prefill_steps(log, admitted, first)
    return Wait(
        request_id=request_id,
        prompt_tokens=arrival.value,
        slots_full=queued["slots_full"],
        group=queued["group"],
        blocks_short=queued["blocks_short"],
        in_line=queued["in_line"],
        between_steps=max(until - arrival.time - sum(queued.values()), 0.0),
        left_before=sum(e.kind is Kind.FINISHED and arrival.time <= e.time <= until for e in log.events),
        prefill=first.time - admitted.time if first and admitted else None,
        prefill_steps=fed,
        passed_over=passed,
        decode=finished - first.time if first and finished is not None else None,
        preemptions=sum(event.kind is Kind.PREEMPTED for event in own),
        cached_tokens=admitted.value if admitted else 0,
    )


def _queued(log: EventLog, arrival: SequenceEvent, until: float) -> dict[str, float]:
    """Seconds between arrival and `until`, by what the step that ran at the time looked like."""
    seconds = dict.fromkeys(("slots_full", "group", "blocks_short", "in_line"), 0.0)
    for step, duration in zip(log.steps, durations(log.steps), strict=True):
        begin = max(step.end - duration, arrival.time)
        end = min(step.end, until)
        if end > begin:
            seconds[_cause(log, step, arrival.value)] += end - begin
    return seconds


def _cause(log: EventLog, step: StepRecord, prompt_tokens: int) -> str:
    house = log.house
    if house.max_num_seqs and step.running >= house.max_num_seqs:
        return "slots_full"
    if house.policy == "static" and step.running:
        return "group"
    if house.block_size and step.free_blocks * house.block_size < prompt_tokens + 1:
        return "blocks_short"
    return "in_line"


def _prefill_steps(log: EventLog, admitted: SequenceEvent, first: SequenceEvent) -> tuple[int, int]:
    """(steps that fed it, steps that did not) from its admission to its first token."""
    fed = passed = 0
    for step in log.steps:
        if admitted.step_id <= step.step_id <= first.step_id:
            mine = any(item.seq_id == first.seq_id for item in step.items)
            fed, passed = fed + mine, passed + (not mine)
    return fed, passed
