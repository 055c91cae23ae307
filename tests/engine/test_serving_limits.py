"""Where the face for servers ends a request or refuses it: full queues, deadlines, drain, failures."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from liushui.config import ServingConfig
from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.async_engine import AsyncEngine
from liushui.engine.inprocess import InProcessEngine
from liushui.errors import CapacityError, ModelError, Overloaded, ParameterError
from tests.engine import cores
from tests.engine.faces import CONFIG, LONG, apart, ask, in_process, run, to_the_end, until, up, whole
from tests.engine.scripted import ScriptedExecutor, make_engine, saying, tiny_tokenizer

# -- at the door


def test_a_full_queue_says_when_to_come_back() -> None:
    async def work() -> None:
        async with up(in_process("make_slow", max_queue_requests=3)) as engine:
            streams = [await engine.submit(ask([number + 1])) for number in range(4 + 3)]
            with pytest.raises(Overloaded) as refused:
                await engine.submit(ask([99]))
            assert refused.value.reason == "queue_requests"
            assert 1.0 <= refused.value.retry_after <= 300.0
            waiting = engine._queue.requests
            await streams[-1].aclose()  # one leaves the queue, one may join
            await until(lambda: engine._queue.requests < waiting)
            streams[-1] = await engine.submit(ask([98]))
            for stream in streams:
                assert (await to_the_end(stream))[-1].error is None
            assert engine.stats().refused == {"queue_requests": 1}

    run(work)


def test_the_queue_is_bounded_in_tokens_too() -> None:
    async def work() -> None:
        async with up(in_process("make_slow", max_queue_tokens=50)) as engine:
            big = await engine.submit(ask([5] * 60))  # nobody waits: it may
            with pytest.raises(Overloaded) as refused:
                await engine.submit(ask([6] * 20, SamplingParams(n=3, max_tokens=4)))
            assert refused.value.reason == "queue_tokens"
            await to_the_end(big)

    run(work)


def test_a_measured_rate_makes_the_retry_after() -> None:
    from liushui.engine.admission import Queue, Rate

    queue = Queue(ServingConfig(), 1)
    for second in range(20):  # ten tokens and one request enter every second
        queue.join(10)
        queue.entered(10, 100.0 + second)
    for _ in range(40):
        queue.join(10)
    assert queue.retry_after(120.0) == pytest.approx(20, rel=0.1)  # half of forty
    for _ in range(40):
        queue.leave(10)
    assert queue.retry_after(120.0) == 1.0
    rate = Rate(10.0)
    assert rate.per_second(5.0) == 0.0
    rate.add(0.0, 100)
    assert rate.per_second(0.1) == 100.0  # at least a second
    assert rate.per_second(5.0) == 20.0
    assert rate.per_second(11.0) == 0.0


def test_refusals_name_the_field_and_cost_nothing() -> None:
    async def work() -> None:
        async with up(in_process()) as engine:
            for request, error, field in [
                (ask([5] * 200), CapacityError, "prompt"),
                (ask([5], SamplingParams(max_tokens=1000)), CapacityError, "max_tokens"),
                (ask([]), ParameterError, "prompt_token_ids"),
                (ask([10**6]), ParameterError, "prompt_token_ids"),
                (ask([5], priority=101), ParameterError, "priority"),
                (ask([5], timeout=float("nan")), ParameterError, "timeout"),
                (ask([5], timeout=0.0), ParameterError, "timeout"),
                (ask([5], request_id="a/b"), ParameterError, "request_id"),
            ]:
                with pytest.raises(error) as refused:
                    await engine.submit(request)
                assert refused.value.field == field
            first = await engine.submit(ask([5], request_id="mine"))
            with pytest.raises(ParameterError, match="in use"):
                await engine.submit(ask([5], request_id="mine"))
            await to_the_end(first)
            assert (await whole(engine, ask([5], request_id="mine")))[0].request_id == "mine"

    run(work)


# -- time


@pytest.mark.parametrize("kind", [in_process, apart])
def test_deadlines_end_the_running_and_the_waiting(
    kind: Any, steps: cores.Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has some tokens when its time is over, one none: its place comes too late."""
    monkeypatch.setattr("liushui.engine.async_engine._GRACE", 100.0)  # the loop itself is to find out

    async def work() -> None:
        async with up(kind("make_gated", tmp_path / "steps")) as engine:
            loop = asyncio.get_running_loop()
            forever = [await engine.submit(ask([n], LONG)) for n in range(5, 8)]
            late = await engine.submit(ask([8], LONG, timeout=2.0, stream=True))
            queued = await engine.submit(ask([9], LONG, timeout=1.0))
            passed = loop.time() + 2.0
            steps.let(3)
            first = await anext(late)
            await until(lambda: loop.time() > passed)
            steps.open()
            *deltas, output = [first, *await to_the_end(late)]
            assert (output.error_code, output.outputs[0].finish_reason) == ("timeout", FinishReason.TIMEOUT)
            assert 0 < len(output.outputs[0].token_ids) < 60
            assert deltas[-1].finish_reason is FinishReason.TIMEOUT
            assert deltas[-1].error == "its deadline has passed"
            (waited,) = await to_the_end(queued)
            assert (waited.error_code, waited.outputs[0].token_ids) == ("timeout", [])
            assert [(await to_the_end(stream))[-1].error for stream in forever] == [None] * 3

    run(work)


def test_a_loop_that_hangs_ends_no_request_later_than_its_deadline() -> None:
    async def work() -> None:
        engine = apart("make_stuck", stall=0.05)
        await engine.start()
        output, _ = await whole(engine, ask([5], LONG, timeout=0.2))
        assert (output.error_code, output.outputs[0].finish_reason) == ("timeout", FinishReason.TIMEOUT)
        stream = await engine.submit(ask([6], LONG))
        await asyncio.sleep(0.1)
        assert not engine.ready().ready
        assert "no step" in engine.ready().why
        views = await engine.requests()
        assert [view.state for view in views] == ["waiting"]
        await engine.close()
        assert (await to_the_end(stream))[-1].error_code == "aborted"

    from liushui.engine import links

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_GOODBYE", 0.2)  # it will not say goodbye by itself
        run(work)


# -- the end


@pytest.mark.parametrize("kind", [in_process, apart])
def test_drain_finishes_what_is_there_and_refuses_what_is_new(kind: Any) -> None:
    async def work() -> None:
        engine = kind("make_slow")
        assert not engine.ready().ready
        await engine.start()
        assert engine.ready() == (True, "")
        streams = [await engine.submit(ask([n], SamplingParams(max_tokens=20, ignore_eos=True))) for n in range(6)]
        drained = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        assert not engine.ready().ready
        with pytest.raises(Overloaded) as refused:
            await engine.submit(ask([5]))
        assert refused.value.reason == "draining"
        assert await drained
        for stream in streams:
            (output,) = await to_the_end(stream)
            assert (output.error, len(output.outputs[0].token_ids)) == (None, 20)
        await engine.close()
        await engine.close()

    run(work)


def test_drain_gives_up_after_its_time(steps: cores.Steps, tmp_path: Path) -> None:
    async def work() -> None:
        engine = in_process("make_gated", tmp_path / "steps")
        await engine.start()
        stream = await engine.submit(ask([5], LONG, stream=True))
        assert not await engine.drain(0.05)
        output = (await to_the_end(stream))[-1]
        assert output.error_code == "aborted"
        steps.open()
        await engine.close()

    run(work)


def test_a_text_that_cannot_be_made_is_an_error_of_that_request(steps: cores.Steps, tmp_path: Path) -> None:
    async def work() -> None:
        async with up(in_process("make_gated", tmp_path / "steps")) as engine:
            other = asyncio.create_task(whole(engine, ask([6], LONG)))
            stream = await engine.submit(ask([5], LONG, stream=True))
            steps.let(2)
            await anext(stream)

            class Broken:
                def push(self, token: int) -> str:
                    raise ValueError("no such character")

                flush = push

            stream.live.answers[0].answer._stream = Broken()
            steps.open()
            output = (await to_the_end(stream))[-1]
            assert "no such character" in output.error
            assert (output.error_code, output.outputs[0].finish_reason) == ("model_error", FinishReason.ERROR)
            assert (await other)[0].error is None

    run(work)


def test_a_failing_step_ends_its_sequences_and_the_engine_lives() -> None:
    async def work() -> None:
        executor = ScriptedExecutor(saying("hello"), fail_step={1: MemoryError("no room")})
        engine = InProcessEngine.around(make_engine(executor), tiny_tokenizer(), CONFIG)
        async with up(engine):
            output, _ = await whole(engine, ask([5], LONG))
            assert (output.error, output.error_code) == ("MemoryError: no room", "model_error")
            output, _ = await whole(engine, ask([5], SamplingParams(max_tokens=9)))
            assert (output.outputs[0].text, output.error) == ("hello", None)

    run(work)


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_model_that_cannot_be_loaded_is_refused_by_name(kind: Any) -> None:
    async def work() -> None:
        engine: AsyncEngine = kind("refuse")
        with pytest.raises(CapacityError) as refused:
            await engine.start()
        assert refused.value.field == "kv_cache_gib"
        assert str(refused.value) == "kv_cache_gib: is too much"
        with pytest.raises(Overloaded, match="being loaded"):
            await engine.submit(ask([5]))
        await engine.close()

    run(work)


def test_a_maker_that_is_not_there_is_an_error_too() -> None:
    async def work() -> None:
        with pytest.raises(ModelError, match="cannot start"):
            await apart("nowhere").start()

    run(work)
