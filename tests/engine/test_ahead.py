"""A source that keeps its reader waiting holds up nobody, and nothing of it is lost."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from liushui.core.request import SamplingParams
from liushui.engine.ahead import Ahead, Direct, NotYet
from tests.engine.scripted import ScriptedExecutor, assert_clean, make_llm

GREEDY = SamplingParams(temperature=0, max_tokens=3)


def test_who_was_admitted_is_answered_while_the_source_waits() -> None:
    llm, go_on = make_llm(), threading.Event()

    def slow() -> Iterator[str]:
        yield "a"
        yield "b"
        assert go_on.wait(60)
        yield "c"

    outputs = llm.generate_iter(slow(), GREEDY)
    assert {next(outputs).index, next(outputs).index} == {0, 1}  # and the source has not moved
    assert not go_on.is_set()
    go_on.set()
    assert [output.index for output in outputs] == [2]
    assert_clean(llm.engine)


def test_a_refused_prompt_is_told_while_the_source_waits() -> None:
    llm, go_on = make_llm(), threading.Event()

    def slow() -> Iterator[str]:
        yield ""
        assert go_on.wait(60)
        yield "b"

    outputs = llm.generate_iter(slow(), GREEDY)
    assert next(outputs).error is not None
    go_on.set()
    assert [output.index for output in outputs] == [1]


def test_steps_run_while_the_source_is_stuck() -> None:
    """Tokens of the first request come, though the second never does; leaving does not wait for it."""
    stuck, steps = threading.Event(), []
    llm = make_llm(ScriptedExecutor(on_step=steps.append))

    def source() -> Iterator[str]:
        yield "a"
        stuck.wait(60)
        yield "b"

    outputs = llm.generate_iter(source(), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    assert next(outputs).index == 0
    assert len(steps) >= 9
    outputs.close()
    assert_clean(llm.engine)
    stuck.set()


@pytest.mark.parametrize("read_ahead", [True, False])
def test_nothing_is_lost_and_order_is_kept(read_ahead: bool) -> None:
    llm = make_llm(max_num_seqs=2)
    texts = [f"prompt {i}" for i in range(60)]
    params = (SamplingParams(temperature=0, max_tokens=1 + i % 5) for i in range(60))
    outputs = list(llm.generate_iter(iter(texts), params, read_ahead=read_ahead))
    assert sorted(output.index for output in outputs) == list(range(60))
    assert all(output.prompt == texts[output.index] for output in outputs)
    assert_clean(llm.engine)


def test_by_whom_it_is_read() -> None:
    readers: list[threading.Thread] = []

    def source() -> Iterator[str]:
        readers.append(threading.current_thread())
        yield "a"

    llm = make_llm()
    for read_ahead in (False, True):
        assert len(list(llm.generate_iter(source(), GREEDY, read_ahead=read_ahead))) == 1
    assert readers[0] is threading.main_thread()
    assert readers[1].name == "liushui-source"


def test_what_the_source_raises_comes_after_what_it_gave() -> None:
    llm = make_llm()

    def broken() -> Iterator[str]:
        yield "a"
        raise OSError("the file is gone")

    outputs = llm.generate_iter(broken(), GREEDY)
    assert next(outputs).index == 0
    with pytest.raises(OSError, match="the file is gone"):
        next(outputs)
    assert_clean(llm.engine)


@pytest.mark.parametrize("kind", [Direct, Ahead])
def test_a_supply_by_itself(kind: Any) -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for i in range(3):
            read.append(i)
            yield i

    supply = kind(source())
    assert read == []
    assert supply.take(wait=True) == 0
    assert read == [0]  # one at a time
    assert [supply.take(wait=True), supply.take(wait=True)] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            supply.take(wait=True)
    supply.close()


def test_an_item_that_comes_late_is_there_at_the_next_take() -> None:
    go_on = threading.Event()

    def source() -> Iterator[str]:
        go_on.wait(60)
        yield "late"

    supply = Ahead(source())
    for _ in range(3):
        with pytest.raises(NotYet):
            supply.take(wait=False)
    go_on.set()
    assert supply.take(wait=True) == "late"
    supply.close()
