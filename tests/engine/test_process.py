"""An engine process that dies, a server that dies: nothing hangs, nothing is left, nobody gets another's answer."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.config import EngineConfig, ServingConfig
from liushui.core.plan import TokenLogprobs
from liushui.core.request import FinishReason, Request, SamplingParams
from liushui.engine import async_engine, wire
from liushui.engine.messages import Ended, Facts, Orders, SequenceTimes, Setup, Step, Tokens, Told, View
from liushui.engine.outputs import RequestOutput
from liushui.errors import Overloaded
from tests.engine import cores
from tests.engine.faces import LONG, apart, ask, in_process, run, to_the_end, up, whole


async def killed(engine: Any) -> None:
    """Dead, and found to be."""
    os.kill(engine.engine_pid, signal.SIGKILL)
    while engine.ready().ready:
        await asyncio.sleep(0.002)


def test_kill_under_load(steps: cores.Steps, tmp_path: Path) -> None:
    """What streamed ends with an error; the rest is answered by the next process, bit for bit as if nothing was."""
    params = [SamplingParams(max_tokens=25, seed=n, ignore_eos=True, logprobs=1, n=1 + n % 2) for n in range(12)]

    async def work() -> None:
        async with up(in_process()) as calm:
            expected = [(await whole(calm, ask([n + 5, 9], p)))[0] for n, p in enumerate(params)]
        async with up(apart("make_gated", tmp_path / "steps")) as engine:
            first = engine.engine_pid
            streams = [await engine.submit(ask([n + 5, 9], p, stream=n < 2)) for n, p in enumerate(params)]
            steps.let(4)
            seen = [await anext(stream) for stream in streams[:2]]
            await killed(engine)
            steps.open()
            assert "SIGKILL" in engine.ready().why
            late = await engine.submit(ask([5, 9], params[0]))  # accepted: it waits for the next process
            ends = [(await to_the_end(stream))[-1] for stream in [*streams, late]]
            assert engine.ready().ready
            assert engine.engine_pid != first
            counters = engine.stats().counters
            assert (counters["engine_restarts"], counters["retried_requests"]) == (1, 10)
        for output, delta in zip(ends[:2], seen, strict=True):
            assert output.error_code == "engine_died"
            assert "killed by SIGKILL" in output.error
            assert output.outputs[0].finish_reason is FinishReason.ERROR
            assert output.outputs[0].token_ids[: len(delta.token_ids)] == list(delta.token_ids)
        for output, right in zip([*ends[2:12], ends[12]], [*expected[2:], expected[0]], strict=True):
            assert (output.error, output.outputs) == (None, right.outputs)

    run(work)


def test_kill_again_and_again() -> None:
    """A process that answers something in between is started as often as it takes."""

    async def work() -> None:
        async with up(apart("make_slow")) as engine:
            for _ in range(6):
                assert (await whole(engine, ask([5], SamplingParams(max_tokens=3, ignore_eos=True))))[0].error is None
                await killed(engine)
            assert (await whole(engine, ask([5], LONG)))[0].error is None
            assert engine.stats().counters["engine_restarts"] == 6

    run(work)


def test_a_request_that_kills_is_not_sent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_BACKOFF", (0.0, 0.0, 0.0, 0.0))

    async def work() -> None:
        async with up(apart()) as engine:
            output, _ = await whole(engine, ask([cores.POISON], LONG))
            assert output.error_code == "engine_died"
            assert "exit code 7 (3 times with this request)" in output.error
            assert (await whole(engine, ask([5], LONG)))[0].error is None
            assert engine.ready().ready

    run(work)


def test_an_engine_that_cannot_come_back_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_BACKOFF", (0.0, 0.0))

    async def work() -> None:
        engine = apart("make_slow")
        await engine.start()
        stream = await engine.submit(ask([5], LONG))
        engine._link._setup = engine._link._setup._replace(maker="tests.engine.cores:refuse")
        await killed(engine)
        (output,) = await to_the_end(stream)
        assert output.error_code == "engine_died"
        assert "is too much" in output.error
        assert not engine.ready().ready
        assert "not started again" in engine.ready().why
        with pytest.raises(Overloaded) as refused:
            await engine.submit(ask([5]))
        assert refused.value.reason == "failed"
        assert await engine.drain(1)
        await engine.close()

    run(work)


def test_leaving_while_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_BACKOFF", (0.3,))

    async def work() -> None:
        async with up(apart("make_slow")) as engine:
            stays, leaves = await engine.submit(ask([5], LONG)), await engine.submit(ask([6], LONG))
            await killed(engine)
            views = await engine.requests()
            assert [view.state for view in views] == ["waiting", "waiting"]
            assert "SIGKILL" in views[0].why
            await leaves.aclose()
            assert (await to_the_end(stays))[-1].error is None
            assert engine.stats().finished == {"abort": 1, "length": 1}

    run(work)


def test_signals_to_the_group_do_not_end_the_engine() -> None:
    """Ctrl-C goes to every process of the terminal; the server drains, so its engine must live."""

    async def work() -> None:
        async with up(apart("make_slow")) as engine:
            stream = await engine.submit(ask([5], LONG))
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(engine.engine_pid, number)
            (output,) = await to_the_end(stream)
            assert output.error is None
            assert engine.stats().counters["engine_restarts"] == 0

    run(work)


FRONT = """
import asyncio, sys
from tests.engine.faces import LONG, apart, ask

async def work():
    engine = apart(sys.argv[1])
    await engine.start()
    await engine.submit(ask([5], LONG))
    print(engine.engine_pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(work())
"""


@pytest.mark.parametrize("maker", ["make_slow", "make_stuck"])
def test_the_engine_does_not_outlive_its_server(maker: str) -> None:
    """However the server ends, and also in the middle of a step that never comes back."""
    front = subprocess.Popen([sys.executable, "-c", FRONT, maker], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    front.kill()
    front.wait()
    end = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.005)
    front.stdout.close()


def alive(pid: int) -> bool:
    """Whether it runs; the dead that nobody has fetched do not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_closing_leaves_no_process() -> None:
    async def work() -> None:
        engine = apart()
        await engine.start()
        pid = engine.engine_pid
        await engine.close()
        assert engine.engine_pid is None
        assert not alive(pid)

    run(work)


# -- the bytes between


REQUEST = Request(
    "7",
    (1, 2, 3),
    SamplingParams(n=2, temperature=0.7, stop=["a", "你"], logit_bias={3: -1.5}, stop_token_ids=[4], logprobs=3),
    seed=2**62,
    max_tokens=9,
    eos_token_ids=frozenset({0, 2}),
    arrival_time=12.25,
    deadline=99.5,
    priority=-3,
    tenant="a key",
    cache_salt="5:a key:",
)
floats = st.floats(allow_nan=False)
logprobs = st.builds(
    TokenLogprobs,
    st.integers(0, 2**31),
    floats,
    st.integers(1, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), floats), max_size=3).map(tuple),
)


def through(message: Any, decoder: Any) -> Any:
    (body,) = wire.Frames().feed(wire.frame(message))
    return decoder.decode(body)


def test_orders_arrive_as_they_were_sent() -> None:
    orders = Orders((REQUEST,), ("7/1",), (("7", FinishReason.ABORT),), (3,), True)
    assert through(orders, wire.orders) == orders
    setup = Setup(EngineConfig(model="x", dtype="float32"), ServingConfig(timeout=None), "a:b", ("/c",))
    assert through(setup, wire.setup) == setup
    facts = Facts(1, 2, 3, 4, 5, ("a line",), "broken", "ModelError", "")
    assert through(facts, wire.facts) == facts


ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Tokens, st.text(max_size=4), ids, st.lists(logprobs, max_size=2).map(tuple)), max_size=4))
def test_news_arrive_to_the_last_bit(tokens: list[Tokens]) -> None:
    ended = [Ended("1", FinishReason.STOP, SequenceTimes(1.5, None, 2.5), None)]
    told = Told(tokens, ended=ended, steps=[Step(0.5, 3, 2)], views=[(1, [View("1", "running", "why", 3, 4)])])
    assert through(told, wire.told) == told


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_frames_do_not_depend_on_how_the_bytes_come(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    frames, found = wire.Frames(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert found == bodies


def test_what_cannot_be_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="a frame of"):
        wire.Frames().feed(b"\xff\xff\xff\xff")
    with pytest.raises(msgspec.ValidationError):
        wire.orders.decode(msgspec.msgpack.encode({"submit": "all"}))
    with pytest.raises(msgspec.DecodeError):
        wire.told.decode(b"\xc1")


def test_a_process_that_says_nonsense_counts_as_dead() -> None:
    async def work() -> None:
        async with up(apart("make_slow")) as engine:
            stream = await engine.submit(ask([5], LONG))
            engine._link._writer.write(b"\x00\x00\x00\x01\xc1")
            output = (await to_the_end(stream))[-1]
            assert isinstance(output, RequestOutput)
            assert output.error is None  # nothing of it was seen: the next process answered it
            assert engine.stats().counters["engine_restarts"] == 1

    run(work)
