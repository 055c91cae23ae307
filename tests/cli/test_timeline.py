"""The picture and the table of the demo, from logs written by hand."""

from pathlib import Path

import pytest

from liushui.cli.demo import compare, table
from liushui.cli.timeline import Bar, Panel, bars, colours, darker, draw, headline
from liushui.core.plan import PlanItem, StepPlan
from liushui.core.request import FinishReason
from liushui.engine.events import EventLog, House, Kind, SequenceEvent
from liushui.engine.metrics import summarize


def item(seq_id: str, slot: int, start: int, count: int = 1, samples: bool = True) -> PlanItem:
    return PlanItem(seq_id, slot, start, count, (), (), samples)


@pytest.fixture
def log() -> EventLog:
    """a reads in two chunks and says three tokens; b waits a step in the middle; c takes a's seat."""
    log = EventLog(House("continuous", 2, 10, 16))
    for name in ("a", "b", "c"):
        log.add(SequenceEvent(Kind.ARRIVED, 10.0, name, name, 8))
    steps = [
        [item("a", 0, 0, 4, samples=False)],
        [item("a", 0, 4, 4), item("b", 1, 0, 2)],
        [item("a", 0, 8)],
        [item("a", 0, 9), item("b", 1, 2)],
        [item("c", 0, 0, 3), item("b", 1, 3)],
    ]
    for number, items in enumerate(steps):
        log.add_step(StepPlan(number, tuple(items)), 10.0 + number, 11.0 + number, 0, 2, 5)
    for name, tokens, step in (("a", 3, 3), ("b", 3, 4), ("c", 1, 4)):
        log.add(SequenceEvent(Kind.FINISHED, 11.0 + step, name, name, tokens, step, FinishReason.STOP, 11.0 + step))
    return log


def test_steps_that_follow_each_other_are_one_bar(log: EventLog):
    assert sorted(bars(log), key=lambda bar: (bar.seq_id, bar.start)) == [
        Bar("a", 0, 0.0, 2.0, True),
        Bar("a", 0, 2.0, 4.0, False),
        Bar("b", 1, 1.0, 2.0, True),
        Bar("b", 1, 3.0, 5.0, False),
        Bar("c", 0, 4.0, 5.0, True),
    ]


def test_a_step_that_was_in_flight_when_the_sequence_ended_is_not_drawn(log: EventLog):
    log.add_step(StepPlan(5, (item("c", 0, 3),)), 15.0, 16.0, 0, 1, 5)
    assert max(bar.end for bar in bars(log)) == 5.0


def test_a_request_keeps_its_colour(log: EventLog):
    other = EventLog()
    other.events = list(log.events)
    other.steps = list(reversed(log.steps))
    assert colours(log) == colours(other)
    assert len(set(colours(log).values())) == 3


def test_the_prompts_shade_is_darker():
    assert sum(bytes.fromhex(darker("#3d85c6")[1:])) < sum(bytes.fromhex("3d85c6"))


@pytest.mark.parametrize("panels", [1, 2])
def test_a_picture_is_drawn(log: EventLog, tmp_path: Path, panels: int):
    path = tmp_path / "t.png"
    draw([Panel(log, "title", headline(summarize(log)))] * panels, path, "all")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_empty_log_can_be_drawn(tmp_path: Path):
    draw([Panel(EventLog(), "nothing")], tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 0


def test_the_table_says_how_many_times_better_continuous_is(log: EventLog):
    one = summarize(log)
    slow = EventLog(log.house)
    slow.events = [event._replace(time=10 + 2 * (event.time - 10)) for event in log.events]
    slow.steps = [step._replace(start=10 + 2 * (step.start - 10), end=10 + 2 * (step.end - 10)) for step in log.steps]
    text = table(summarize(slow), one)
    rate = next(line for line in text.splitlines() if line.startswith("output tokens/s"))
    assert rate.split()[-3:] == ["0.7", "1.4", "2.00x"]
    assert "all answered after" in text


def test_a_different_token_is_found(capsys):
    from types import SimpleNamespace

    from liushui.cli.demo import Run

    def run(*tokens: int) -> Run:
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(tokens))])
        return Run("x", None, None, {0: (None, output)}, 0)

    assert compare(run(1, 2), run(1, 2))
    assert not compare(run(1, 2), run(1, 3))
    assert not compare(run(1, 2), run(1))
    assert "DIFFERENT" in capsys.readouterr().err
