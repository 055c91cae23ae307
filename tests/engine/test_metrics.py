"""The log, and the numbers made from it, on runs small enough to count by hand."""

from pathlib import Path

import pytest

from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.events import EventLog, House, Kind, SequenceEvent, StepItem, StepRecord
from liushui.engine.metrics import durations, mean_batch, quantile, request_timings, summarize, wasted_slots
from liushui.engine.waits import explain_wait
from tests.engine.scripted import ScriptedExecutor, make_engine, run_all, saying


def step(number: int, start: float, end: float, *seats: tuple[str, int], **house: int) -> StepRecord:
    items = tuple(StepItem(seq, slot, 0, 1, True) for seq, slot in seats)
    full = {"waiting": 0, "running": len(seats), "free_blocks": 9} | house
    return StepRecord(number, start, end, items, **full)


def life(seq: str, arrival: float, admitted: float, first: float, end: float, last_step: int, tokens: int) -> list:
    return [
        SequenceEvent(Kind.ARRIVED, arrival, seq, seq, 3),
        SequenceEvent(Kind.ADMITTED, admitted, seq, seq, 1, 0),
        SequenceEvent(Kind.FIRST_TOKEN, first, seq, seq, step_id=0),
        SequenceEvent(Kind.FINISHED, end, seq, seq, tokens, last_step, FinishReason.LENGTH, end),
    ]


def make_log(policy: str = "continuous") -> EventLog:
    """Two slots; a lives for steps 0 to 3, b for step 0 only, and c sits in b's slot in steps 2 and 3."""
    log = EventLog(House(policy, 2, 10, 4))
    for event in [*life("a", 0, 0, 1, 6, 3, 4), *life("b", 0, 0, 1, 1, 0, 1), *life("c", 1, 2, 4, 6, 3, 2)]:
        log.add(event)
    for record in (
        step(0, 0, 1, ("a", 0), ("b", 1)),
        step(1, 1, 2, ("a", 0)),
        step(2, 2, 4, ("a", 0), ("c", 1)),
        step(3, 4, 6, ("a", 0), ("c", 1)),
    ):
        log.steps.append(record)
    return log


def test_wasted_slots_by_hand() -> None:
    # slot-seconds: 2 slots * 6 s = 12; empty: slot 1 in step 1 for 1 s
    assert wasted_slots(make_log()) == pytest.approx(1 / 12)
    assert mean_batch(make_log()) == pytest.approx(11 / 6)


def test_a_slot_held_by_the_dead_is_wasted() -> None:
    log = make_log()
    log.steps[1] = step(1, 1, 2, ("a", 0), ("b", 1))  # b had ended in step 0
    assert wasted_slots(log) == pytest.approx(1 / 12)


def test_overlapping_steps_are_not_counted_twice() -> None:
    steps = [step(0, 0, 2, ("a", 0)), step(1, 1, 3, ("a", 0)), step(2, 5, 6, ("a", 0))]
    assert list(durations(steps)) == [2, 1, 1]


def test_summary_by_hand() -> None:
    summary = summarize(make_log())
    assert (summary.requests, summary.failed, summary.steps, summary.preemptions) == (3, 0, 4, 0)
    assert (summary.output_tokens, summary.prompt_tokens, summary.cached_tokens) == (7, 9, 3)
    assert summary.output_tokens_per_second == pytest.approx(7 / 6)
    assert summary.mean_ttft == pytest.approx((1 + 1 + 3) / 3)
    assert summary.mean_completion == pytest.approx((6 + 1 + 5) / 3)
    assert summary.p99_ttft == pytest.approx(1 + 2 * 0.98)
    assert summary.mean_inter_token == pytest.approx(((6 - 1) / 3 + (6 - 4) / 1) / 2)
    assert "7 output tokens in 6.00 s = 1.2 tokens/s" in summary.lines()[0]


def test_an_empty_log_has_no_numbers() -> None:
    summary = summarize(EventLog())
    assert (summary.requests, summary.wasted_slots, summary.mean_ttft) == (0, None, None)
    assert summary.lines()


@pytest.mark.parametrize(("q", "value"), [(0, 1.0), (0.5, 2.5), (1, 4.0), (0.99, 3.97)])
def test_quantile(q: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(value)
    assert quantile([], q) is None


def test_continuous_wastes_less_than_static() -> None:
    def run(policy: str) -> float:
        engine = make_engine(ScriptedExecutor(saying("x" * 60)), policy=policy, prefix_caching=False)
        for length in (2, 20, 3, 2, 9, 2, 2, 15):
            engine.add_request("a", SamplingParams(max_tokens=length), now=engine.clock())
        run_all(engine)
        wasted = summarize(engine.log).wasted_slots
        assert wasted is not None
        return wasted

    assert run("continuous") < 0.5 < run("static")


def test_part_of_a_log() -> None:
    engine = make_engine()
    engine.add_request("a", SamplingParams(max_tokens=2))
    run_all(engine)
    mark = engine.log.mark()
    engine.add_request("b", SamplingParams(max_tokens=3))
    run_all(engine)
    part = engine.log.since(mark)
    assert [event.kind for event in part.events] == [Kind.ARRIVED, Kind.ADMITTED, Kind.FIRST_TOKEN, Kind.FINISHED]
    assert (summarize(part).output_tokens, len(part.steps)) == (3, 3)
    assert summarize(engine.log).output_tokens == 5


def test_the_log_can_be_bounded() -> None:
    engine = make_engine(log_limit=5)
    engine.add_request("a", SamplingParams(max_tokens=4, ignore_eos=True))
    mark = engine.log.mark()
    engine.add_request("b", SamplingParams(max_tokens=20, ignore_eos=True))
    run_all(engine)
    assert (len(engine.log.events), len(engine.log.steps)) == (5, 5)
    assert engine.log.forgotten.steps == 15
    assert len(engine.log.since(mark).steps) == 5
    assert summarize(engine.log).steps == 5


def test_a_log_survives_its_file(tmp_path: Path) -> None:
    engine = make_engine(num_blocks=10, max_model_len=40)
    for text in "abc":
        engine.add_request(text, SamplingParams(max_tokens=25, n=1, ignore_eos=True))
    run_all(engine)
    engine.log.save(tmp_path / "log.jsonl")
    again = EventLog.read(tmp_path / "log.jsonl")
    assert list(again.events) == list(engine.log.events)
    assert list(again.steps) == list(engine.log.steps)
    assert again.house == engine.log.house
    assert request_timings(again) == request_timings(engine.log)


def test_events_come_in_order_and_balance() -> None:
    engine = make_engine(num_blocks=10, max_model_len=40)
    ids = [engine.add_request(text, SamplingParams(max_tokens=25, ignore_eos=True)) for text in "abc"]
    run_all(engine)
    for request_id in ids:
        kinds = [event.kind for event in engine.log.events if event.request_id == request_id]
        assert kinds[:3] == [Kind.ARRIVED, Kind.ADMITTED, Kind.FIRST_TOKEN]
        assert kinds[-1] is Kind.FINISHED
        assert kinds.count(Kind.ADMITTED) == kinds.count(Kind.PREEMPTED) + 1
    assert Kind.PREEMPTED in {event.kind for event in engine.log.events}


def test_why_it_waited_slots() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request("a", SamplingParams(max_tokens=10, ignore_eos=True), now=engine.clock())
    late = engine.add_request("b", SamplingParams(max_tokens=2, ignore_eos=True), now=engine.clock())
    outputs, _ = run_all(engine)
    wait = explain_wait(engine.log, late)
    assert wait is not None
    assert wait.slots_full > 0
    assert (wait.blocks_short, wait.group, wait.left_before) == (0, 0, 1)
    assert wait.queued == pytest.approx(outputs[late].timings.queued)
    assert any("all slots were taken" in line for line in wait.lines())


def test_why_it_waited_blocks_and_group() -> None:
    engine = make_engine(num_blocks=10, max_model_len=38, prefix_caching=False)
    engine.add_request([5] * 30, SamplingParams(max_tokens=8, ignore_eos=True))
    late = engine.add_request([6] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    run_all(engine)
    wait = explain_wait(engine.log, late)
    assert wait is not None
    assert wait.blocks_short > 0
    assert wait.prefill_steps >= 2

    engine = make_engine(policy="static")
    engine.add_request("a", SamplingParams(max_tokens=8, ignore_eos=True))
    engine.step()
    late = engine.add_request("b", SamplingParams(max_tokens=2, ignore_eos=True))
    run_all(engine)
    wait = explain_wait(engine.log, late)
    assert wait is not None
    assert wait.group > 0
    assert explain_wait(engine.log, "unknown") is None


def test_why_it_waits_while_it_still_waits() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request("a", SamplingParams(max_tokens=10, ignore_eos=True))
    late = engine.add_request("b", SamplingParams(max_tokens=2))
    for _ in range(3):
        engine.step()
    wait = explain_wait(engine.log, late)
    assert wait is not None
    assert wait.slots_full > 0
    assert wait.prefill is None
    assert wait.decode is None
