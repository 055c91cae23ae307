"""An engine that hangs is found out, killed and replaced; one that takes its time is not."""

import asyncio
import os
import signal
import sys
from typing import Any

import pytest

from liushui.config import ServingConfig
from liushui.core.request import FinishReason, SamplingParams
from liushui.engine import links
from liushui.engine.messages import Ended, Orders, SequenceTimes, Told
from liushui.engine.supervision import COMPUTING, LOOKS, Signs, Watch, signs
from liushui.errors import ModelError, ParameterError
from tests.engine.faces import LONG, apart, ask, in_process, run, to_the_end, up, whole
from tests.engine.test_process import REQUEST, alive

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say what a process does")


class Scene:
    """A watch over a process of which everything is invented."""

    def __init__(self) -> None:
        self.now = 100.0
        self.signs: Signs | None = Signs(5.0, 7, 9)
        self.watch = Watch(80.0, lambda: self.signs, lambda: self.now)

    def until_blamed(self, limit: float, cpu: float = 0.0, faults: float = 0.0, read: float = 0.0) -> float | None:
        """Seconds until it is taken to hang, looked at as it should be; the signs grow by so much a second."""
        start, before = self.now, self.signs
        while self.now < start + limit:
            self.now += self.watch.period
            if before is not None:
                gone = self.now - start
                grown = before.cpu + cpu * gone, before.faults + int(faults * gone), before.read + int(read * gone)
                self.signs = Signs(*grown)
            if self.watch.look():
                return self.now - start
        return None

    def owes(self) -> None:
        self.watch.sent(Orders((REQUEST,)))


def test_patience() -> None:
    scene = Scene()
    assert scene.until_blamed(10_000.0) is None  # it owes nothing
    scene.owes()
    assert scene.until_blamed(10_000.0) == pytest.approx(80.0, abs=2 * scene.watch.period)


@pytest.mark.parametrize("sign", [{"cpu": 0.03}, {"faults": 0.1}, {"read": 0.1}])
def test_who_computes_or_reads_may_take_ten_times_as_long(sign: dict[str, float]) -> None:
    scene = Scene()
    scene.owes()
    found = scene.until_blamed(10_000.0, **sign)
    assert found == pytest.approx(80.0 * COMPUTING, abs=2 * scene.watch.period)


def test_a_little_of_a_processor_is_not_computing() -> None:
    """The thread that lives on beside a loop that hangs."""
    scene = Scene()
    scene.owes()
    assert scene.until_blamed(10_000.0, cpu=0.01) == pytest.approx(80.0, abs=2 * scene.watch.period)


def test_where_the_system_says_nothing_only_silence_counts() -> None:
    scene = Scene()
    scene.signs = None
    scene.owes()
    assert scene.until_blamed(10_000.0) == pytest.approx(80.0 * COMPUTING, abs=2 * scene.watch.period)


def test_every_message_is_a_sign_of_life() -> None:
    scene = Scene()
    scene.owes()  # two answers
    times = SequenceTimes()
    for told in [Told(), Told(ended=[Ended("7/0", FinishReason.STOP, times)]), Told()]:
        assert scene.until_blamed(70.0) is None
        assert scene.watch.quiet == pytest.approx(70.0)
        scene.watch.heard(told)
        assert scene.watch.quiet == 0.0
    assert scene.until_blamed(70.0) is None
    scene.watch.heard(Told(ended=[Ended("7/1", FinishReason.STOP, times)]))
    assert scene.until_blamed(10_000.0) is None
    assert scene.watch.quiet == 0.0


def test_a_server_that_was_stopped_itself_blames_nobody() -> None:
    scene = Scene()
    scene.owes()
    scene.now += 10_000.0
    assert scene.watch.look() == ""
    assert scene.until_blamed(10_000.0) == pytest.approx(80.0, abs=4 * scene.watch.period)


def test_a_new_process_owes_its_first_message() -> None:
    scene = Scene()
    scene.owes()
    scene.watch.starts()
    assert scene.until_blamed(10_000.0) == pytest.approx(80.0, abs=2 * scene.watch.period)
    scene.watch.starts()
    scene.watch.ready()
    assert scene.until_blamed(10_000.0) is None


def test_the_time_is_a_setting() -> None:
    assert ServingConfig().validate().hang_timeout >= 2 * ServingConfig().stall
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match="hang_timeout"):
            ServingConfig(hang_timeout=seconds).validate()


@linux
def test_signs_of_a_process() -> None:
    before = signs(os.getpid())
    for _ in range(1000):  # ticks are hundredths of a second
        sum(range(100_000))
        now = signs(os.getpid())
        assert before is not None
        assert now is not None
        if now.cpu > before.cpu:
            break
    assert now.cpu > before.cpu
    assert now.read > before.read
    assert signs(2**22 + 1) is signs(None) is None


async def _stopped(engine: Any) -> int:
    """Not dead, and not alive."""
    pid: int = engine.engine_pid
    os.kill(pid, signal.SIGSTOP)
    return pid


@linux
def test_an_engine_that_hangs_is_killed_and_started_again() -> None:
    """As after kill -9: what streamed ends with an error, the rest is answered by the next process, bit for bit."""
    params = [SamplingParams(max_tokens=25, seed=n, ignore_eos=True, logprobs=1, n=1 + n % 2) for n in range(6)]

    async def work() -> None:
        async with up(in_process()) as calm:
            expected = [(await whole(calm, ask([n + 5, 9], p)))[0] for n, p in enumerate(params)]
        async with up(apart("make_slow", hang_timeout=0.4, stall=0.1)) as engine:
            streams = [await engine.submit(ask([n + 5, 9], p, stream=n < 2)) for n, p in enumerate(params)]
            for stream in streams[:2]:
                await anext(stream)
            pid = await _stopped(engine)
            while engine.ready().ready:
                await asyncio.sleep(0.01)
            assert "no step has come back" in engine.ready().why
            while engine.engine_pid == pid:
                await asyncio.sleep(0.01)
            ends = [(await to_the_end(stream))[-1] for stream in streams]
            assert not alive(pid)
            assert engine.ready().ready
            counters = engine.stats().counters
            assert (counters["engine_restarts"], counters["retried_requests"]) == (1, 4)
        for output in ends[:2]:
            assert output.error_code == "engine_died"
            assert "it was killed, because nothing came from it and it did nothing for" in output.error
        for output, right in zip(ends[2:], expected[2:], strict=True):
            assert (output.error, output.outputs) == (None, right.outputs)

    run(work)


@linux
def test_requests_that_give_up_do_not_hide_that_it_hangs() -> None:
    """Nobody waits for longer than half of the patience, and yet it runs out."""

    async def work() -> None:
        async with up(apart("make_slow", hang_timeout=0.4)) as engine:
            pid = await _stopped(engine)
            while engine.engine_pid == pid:
                output, _ = await whole(engine, ask([5], LONG, timeout=0.1))
            assert output.error_code in ("timeout", None)
            assert (await whole(engine, ask([5], LONG)))[0].error is None
            assert engine.stats().counters["engine_restarts"] == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("liushui.engine.async_engine._GRACE", 0.0)
        run(work)


@linux
def test_an_engine_without_work_may_stand_still() -> None:
    async def work() -> None:
        async with up(apart(hang_timeout=0.1)) as engine:
            looks, look = 0, engine._link.watch.look

            def counted() -> str:
                nonlocal looks
                looks += 1
                return look()

            engine._link.watch.look = counted
            pid = await _stopped(engine)
            while looks < 4 * LOOKS:
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGCONT)
            assert engine.ready().ready
            engine._link.watch.look = lambda: ""  # it need not be quick
            assert (await whole(engine, ask([5], LONG)))[0].error is None
            assert engine.engine_pid == pid

    run(work)


@linux
def test_a_long_step_that_computes_is_left_alone() -> None:
    async def work() -> None:
        async with up(apart("make_computing", hang_timeout=1.0)) as engine:
            pid = engine.engine_pid
            assert (await whole(engine, ask([5], LONG)))[0].error is None
            assert engine.engine_pid == pid

    run(work)


@linux
def test_an_engine_that_never_loads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_GOODBYE", 0.1)

    async def work() -> None:
        engine = apart("hang", hang_timeout=1.0)
        with pytest.raises(ModelError, match="ended while it loaded the model: it was killed, because nothing came"):
            await engine.start()
        assert engine.engine_pid is None
        await engine.close()

    run(work)
