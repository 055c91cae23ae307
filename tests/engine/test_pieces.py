"""What is long is handed on in pieces: bounded, in turns, and together the same as in one piece."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.plan import TokenLogprobs
from liushui.core.request import FinishReason, Request, SamplingParams
from liushui.engine import attendant, links, ticket
from liushui.engine.answer import Answer
from liushui.engine.attendant import Attendant
from liushui.engine.messages import Orders, Told
from liushui.engine.stops import StopAutomaton
from liushui.engine.text import Vocabulary
from tests.engine import cores
from tests.engine.faces import CONFIG, apart, ask, in_process, run, up, whole
from tests.engine.scripted import EOS, RAW, VOCAB_SIZE, logprob

VOCABULARY = Vocabulary(RAW)
tokens = st.lists(st.sampled_from([EOS, *range(20, 90)]) | st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=60)


def answer(stop: list[str], top: int | None) -> Answer:
    params = SamplingParams(stop=stop, logprobs=top, ignore_eos=True, max_tokens=1000)
    request = Request("1", (5,), params, seed=1, max_tokens=1000, eos_token_ids=frozenset(), arrival_time=0.0)
    return Answer(request, 0, VOCABULARY, StopAutomaton(params.stop_strings) if stop else None)


@settings(max_examples=200, deadline=None)
@given(tokens, st.lists(st.text("abcdef", min_size=1, max_size=4), max_size=3), st.none() | st.just(3), st.data())
def test_pieces_are_bounded_and_add_up(ids: list[int], stop: list[str], top: int | None, data: st.DataObject) -> None:
    """However reading and writing alternate: texts, tokens, log-probabilities; the end with the last, no text early."""
    live, twin, deltas = answer(stop, top), answer(stop, top), []
    for token in ids:
        found = None if top is None else logprob(token, top)
        if live.closed:
            break
        live.push(token, found)
        twin.push(token, found)
        deltas += [live.delta(0, most=data.draw(st.integers(1, 4))) for _ in range(data.draw(st.integers(0, 2)))]
    early = len(deltas)
    live.finish(FinishReason.LENGTH)
    twin.finish(FinishReason.LENGTH)
    most = data.draw(st.integers(1, 5))
    while live.unsent or not deltas or deltas[-1].finish_reason is None:
        deltas.append(live.delta(0, "why", most))
    whole = live.output
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    if top is not None:
        assert [entry for delta in deltas for entry in delta.logprobs] == whole.logprobs
    assert all(len(delta.token_ids) <= (4 if number < early else most) for number, delta in enumerate(deltas))
    ends = [(delta.finish_reason, delta.stop_reason, delta.error) for delta in deltas]
    assert ends == [(None, None, None)] * (len(deltas) - 1) + [(whole.finish_reason, whole.stop_reason, "why")]
    assert twin.delta(0).text == whole.text  # in one piece
    seen = shown = 0
    for delta in deltas[:-1]:  # what is shown is the text of what was handed out
        seen, shown = seen + len(delta.token_ids), shown + len(delta.text)
        assert RAW.decode(whole.token_ids[:seen]).startswith(whole.text[:shown])


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_late_reader_gets_pieces_in_turns(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was read of three answers: their pieces alternate, and between two of them everybody has a turn."""
    monkeypatch.setattr(ticket, "MOST", 12 * 6)
    params = SamplingParams(max_tokens=60, seed=3, n=3, logprobs=5, ignore_eos=True)

    async def work() -> None:
        async with up(kind()) as engine:
            right, _ = await whole(engine, ask([5], params))
            stream = await engine.submit(ask([5], params, stream=True))
            while stream.output is None:
                await asyncio.sleep(0.01)
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            beside = asyncio.create_task(other())
            *deltas, output = [(turns, news) async for news in stream]
            beside.cancel()
            assert output[1].outputs == right.outputs
            assert [delta.output_index for _, delta in deltas] == [0, 1, 2] * 5
            assert all(len(delta.token_ids) == 12 for _, delta in deltas)
            assert [delta.finish_reason is not None for _, delta in deltas] == [False] * 12 + [True] * 3
            assert all(later > earlier for (earlier, _), (later, _) in pairwise(deltas))
            for one in right.outputs:
                mine = [delta for _, delta in deltas if delta.output_index == one.index]
                assert "".join(delta.text for delta in mine) == one.text
                assert [entry for delta in mine for entry in delta.logprobs] == one.logprobs

    run(work)


def test_reading_late_costs_what_the_answer_is_long() -> None:
    """Cutting looks at each token once, however much is unread behind it."""

    class Counted(list):  # type: ignore[type-arg]
        touched = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            Counted.touched += len(found) if isinstance(place, slice) else 1
            return found

    live = answer([], 2)
    for name in ("token_ids", "logprobs"):
        setattr(live.output, name, Counted())
    live._texts, live._text_ends = Counted(), Counted()
    for number in range(4000):
        live.push(30 + number % 50, logprob(30 + number % 50, 2))
    pieces = 0
    while live.unsent:
        live.delta(0, most=10)
        pieces += 1
    assert pieces == 400
    assert Counted.touched <= 4000 * 3 + pieces * 14  # and a binary search for the text of each piece


# -- between the loop and the text


class Kept:
    """`attendant.Channel`."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def receive(self, *, wait: bool) -> list[Orders]:
        raise AssertionError

    def send(self, told: Told) -> None:
        self.told.append(told)


def test_what_the_loop_tells_is_cut_into_messages() -> None:
    channel = Kept()
    core = cores.make(CONFIG, in_process().serving)
    teller = Attendant(core, channel)
    found = [(position, logprob(position, 20)) for position in range(1000)]
    teller.prompt_logprobs("1", found)
    for number in range(500):
        teller.tokens(f"{number}", (7,), (logprob(7, 20),))
    teller.ended("1", FinishReason.STOP, attendant.SequenceTimes(), None)
    teller._tell()
    told = channel.told
    assert [pair for one in told for part in one.prompt_logprobs for pair in part.found] == found
    assert [part.seq_id for one in told for part in one.tokens] == [str(number) for number in range(500)]
    assert [bool(one.ended) for one in told] == [False] * (len(told) - 1) + [True]
    assert all(one.house.num_blocks == 64 for one in told)

    def weight(one: Told) -> int:
        entries: list[TokenLogprobs] = [pair[1] for part in one.prompt_logprobs for pair in part.found]
        return sum(1 + len(entry.top) for entry in entries) + 21 * len(one.tokens)

    assert max(map(weight, told)) <= attendant.BIG * 5 // 4
    assert len(told) <= 2 + 1500 * 21 // attendant.BIG


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_flood_of_news_leaves_room_for_others(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With turns of no length: never two messages in a row while somebody else could run."""
    monkeypatch.setattr(links, "_TURN", 0.0)

    async def work() -> None:
        async with up(kind()) as engine:
            turns, heard = 0, []
            hear: Callable[[Told], None] = engine._hear

            def listen(told: Told) -> None:
                heard.append(turns)
                hear(told)

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            await engine._link.close()
            await engine._link.start(listen, engine._died)
            beside = asyncio.create_task(other())
            outputs = await asyncio.gather(*(whole(engine, ask([n + 5])) for n in range(8)))
            beside.cancel()
            assert all(output.error is None for output, _ in outputs)
            assert len(heard) >= 60
            assert len(set(heard)) == len(heard)

    run(work)


def test_news_that_fail_do_not_end_the_news() -> None:
    """A bug in taking one message: the ones after it arrive all the same."""

    async def work() -> None:
        link = links.ThreadLink(lambda: cores.make(CONFIG, in_process().serving), in_process().serving)
        heard: list[int] = []

        def on_told(told: Told) -> None:
            heard.append(len(told.steps))
            if len(heard) == 1:
                raise ValueError("a bug")

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await link.start(on_told, lambda why: None)
        for _ in range(3):
            link.tell(Told())
        while len(heard) < 3:
            await asyncio.sleep(0.001)
        assert heard == [0, 0, 0]
        await link.close()

    run(work)
