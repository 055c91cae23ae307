"""The face for servers, with a scripted model on a thread and in a process of its own: same answers, nobody waits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liushui.config import EngineConfig, ServingConfig
from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.async_engine import AsyncEngine
from liushui.engine.inprocess import InProcessEngine
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.process import ProcessEngine
from liushui.engine.serving import ServeRequest, salt
from liushui.errors import CapacityError, ModelError, Overloaded, ParameterError
from tests.engine import cores
from tests.engine.scripted import ScriptedExecutor, make_engine, run_all, saying, tiny_tokenizer

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, block_size=4, seed=1)
LONG = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)
KINDS = ["thread", "process"]


def in_process(maker: str = "make", model: Any = None, **serving: Any) -> InProcessEngine:
    config, settings = configured(model), ServingConfig(**serving)
    core = getattr(cores, maker)
    return InProcessEngine(config, settings, core=lambda: core(config, settings), text=cores.text)


def apart(maker: str = "make", model: Any = None, **serving: Any) -> ProcessEngine:
    settings = ServingConfig(**serving)
    return ProcessEngine(configured(model), settings, maker=f"tests.engine.cores:{maker}", text=cores.text)


def configured(model: Any) -> EngineConfig:
    return CONFIG if model is None else replace(CONFIG, model=str(model))


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[cores.Steps]:
    """For `make_gated`, whose model is `tmp_path / "steps"`. Open in the end: nobody waits for ever."""
    held = cores.Steps(tmp_path / "steps")
    yield held
    held.open()


@asynccontextmanager
async def up(engine: Any) -> AsyncIterator[Any]:
    """Started; at the end empty, and every block back."""
    await engine.start()
    try:
        yield engine
        assert await engine.drain(100)
        assert engine._answers == engine._ids == engine._tickets == {}
        assert (engine._queue.requests, engine._queue.tokens) == (0, 0)
        core = getattr(engine._link, "core", None)
        if core is not None:
            await engine._link.close()
            core.scheduler.check()
            assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks
            assert not core.scheduler.has_work
    finally:
        await engine.close()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 200))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def ask(prompt: list[int], params: SamplingParams = LONG, **more: Any) -> ServeRequest:
    return ServeRequest(prompt_token_ids=prompt, params=params, **more)


async def whole(engine: Any, request: ServeRequest) -> tuple[RequestOutput, list[StreamDelta]]:
    *deltas, output = [news async for news in await engine.submit(request)]
    assert isinstance(output, RequestOutput)
    assert all(isinstance(delta, StreamDelta) for delta in deltas)
    return output, deltas


REQUESTS = [
    ask([5, 6, 7], SamplingParams(max_tokens=20, seed=1, logprobs=2), stream=True),
    ask([9] * 30, SamplingParams(max_tokens=8, seed=2, n=3, prompt_logprobs=1), stream=True),
    ask([9] * 29 + [4], SamplingParams(max_tokens=90, seed=4, stop=["a", "z"]), stream=True),
    ask([12], SamplingParams(max_tokens=30, seed=5, stop=["e", "o"], include_stop_str_in_output=True, min_tokens=3)),
    ask([13, 14], SamplingParams(max_tokens=None, seed=6, stop_token_ids=[40, 41, 42, 43, 44])),
    ask([1, 2, 3, 4, 5, 6], SamplingParams(max_tokens=4, seed=6, truncate_prompt_tokens=3)),
]


@pytest.mark.parametrize("kind", [in_process, apart])
def test_answers_are_those_of_the_offline_engine(kind: Any) -> None:
    """Every number, whoever sits beside; also where a stop string is found here while tokens go on there."""
    offline = make_engine()
    for number, request in enumerate(REQUESTS):
        offline.add_request(list(request.prompt_token_ids), request.params, request_id=str(number))
    expected, _ = run_all(offline)

    async def work() -> None:
        async with up(kind()) as engine:
            got = await asyncio.gather(*(whole(engine, request) for request in REQUESTS * 2))
        for number, (output, deltas) in enumerate(got):
            right = expected[str(number % len(REQUESTS))]
            assert output.outputs == right.outputs
            assert output.prompt_logprobs == right.prompt_logprobs
            assert output.prompt_token_ids == right.prompt_token_ids
            assert (output.truncated_tokens, output.error) == (right.truncated_tokens, None)
            assert output.effective_params == right.effective_params
            assert bool(deltas) == REQUESTS[number % len(REQUESTS)].stream
            for answer in output.outputs if deltas else []:
                mine = [delta for delta in deltas if delta.output_index == answer.index]
                assert "".join(delta.text for delta in mine) == answer.text
                assert [token for delta in mine for token in delta.token_ids] == answer.token_ids
                assert [delta.finish_reason for delta in mine if delta.finish_reason] == [answer.finish_reason]
                assert mine[-1].stop_reason == answer.stop_reason

    run(work)


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_stop_string_ends_the_sequence_over_there(kind: Any, steps: cores.Steps, tmp_path: Path) -> None:
    """Found here; the loop hears of it, and computes no step more than the one in flight."""

    async def work() -> None:
        async with up(kind("make_gated", tmp_path / "steps")) as engine:
            params = SamplingParams(max_tokens=100, seed=4, stop=[chr(i) for i in range(97, 123)], ignore_eos=True)
            stream = await engine.submit(ask([7, 8], params, stream=True))
            live = stream.live.answers[0].answer
            for number in range(1, 90):  # each step waits until we have heard of the one before
                steps.let(number)
                await until(lambda number=number: len(live.output.token_ids) >= number or live.closed)
                if live.closed:
                    break
            steps.open()
            output = (await _to_the_end(stream))[-1]
            assert output.outputs[0].finish_reason is FinishReason.STOP
            assert len(output.outputs[0].token_ids) == number < 90
            assert engine.stats().counters["wasted_tokens"] <= 1
            assert output.timings.finished is not None

    run(work)


def test_a_process_has_another_interpreter() -> None:
    async def work() -> None:
        import os

        async with up(apart()) as engine:
            assert engine.engine_pid not in (None, os.getpid())
            assert engine.info.limits.max_model_len == 128
            assert engine.info.max_num_seqs == 4

    run(work)


# -- leaving


@pytest.mark.parametrize("kind", [in_process, apart])
@pytest.mark.parametrize("how", ["aclose", "cancel", "abort", "with"])
def test_who_leaves_costs_no_step_more_than_the_one_in_flight(
    kind: Any, how: str, steps: cores.Steps, tmp_path: Path
) -> None:
    """The fourth step is under way when we leave; the fifth never comes."""

    async def work() -> None:
        async with up(kind("make_gated", tmp_path / "steps")) as engine:
            stream = await engine.submit(ask([5], LONG, stream=True, request_id="mine"))
            steps.let(3)
            seen = 0
            while seen < 3:
                seen += len((await anext(stream)).token_ids)
            if how == "aclose":
                await stream.aclose()
            elif how == "with":
                async with stream:
                    pass
            elif how == "cancel":
                reader = asyncio.create_task(_to_the_end(stream))
                await asyncio.sleep(0)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
            else:
                assert await engine.abort("mine")
            steps.open()
            if how == "abort":
                *_, output = [news async for news in stream]
                assert (output.error_code, output.outputs[0].finish_reason) == ("aborted", FinishReason.ABORT)
            await engine._emptied()
            assert not await engine.abort("mine")
            assert engine.stats().finished == {"abort": 1}
            assert engine.stats().counters["wasted_tokens"] <= 1
            await until(lambda: engine.stats().gauges.running == 0)

    run(work)


async def _to_the_end(stream: Any) -> list[Any]:
    return [news async for news in stream]


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_storm_of_aborts_leaks_nothing(kind: Any) -> None:
    async def work() -> None:
        async with up(kind("make")) as engine:
            expected, _ = await whole(engine, ask([50, 51], LONG))

            async def one(number: int) -> None:
                params = SamplingParams(max_tokens=40, seed=number, n=1 + number % 3, ignore_eos=True)
                stream = await engine.submit(ask([number % 7 + 1] * (number % 20 + 1), params, stream=number % 2 == 0))
                await asyncio.sleep(0.002 * (number % 13))
                await stream.aclose()

            for _ in range(3):
                await asyncio.gather(*(one(number) for number in range(60)))
                again, _ = await whole(engine, ask([50, 51], LONG))
                assert again.outputs == expected.outputs
            house = engine.stats().gauges
            assert (house.running, house.unfinished_requests) == (0, 0)
            assert engine._meter.house.free_blocks == engine._meter.house.num_blocks

    run(work)


@pytest.mark.parametrize("kind", [in_process, apart])
def test_a_slow_reader_gets_it_in_one_piece_and_holds_up_nobody(kind: Any) -> None:
    async def work() -> None:
        async with up(kind()) as engine:
            slow = await engine.submit(ask([5], LONG, stream=True))
            first = await anext(slow)
            fast = await asyncio.gather(*(whole(engine, ask([n], LONG, stream=True)) for n in range(10, 30)))
            assert all(len(output.outputs[0].token_ids) == 60 for output, _ in fast)
            rest = [news async for news in slow]
            assert len(rest) == 2  # all that was missed, and the whole
            assert (*first.token_ids, *rest[0].token_ids) == tuple(rest[1].outputs[0].token_ids)
            assert first.text + rest[0].text == rest[1].outputs[0].text

    run(work)


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
                assert (await _to_the_end(stream))[-1].error is None
            assert engine.stats().refused == {"queue_requests": 1}

    run(work)


def test_the_queue_is_bounded_in_tokens_too() -> None:
    async def work() -> None:
        async with up(in_process("make_slow", max_queue_tokens=50)) as engine:
            big = await engine.submit(ask([5] * 60))  # nobody waits: it may
            with pytest.raises(Overloaded) as refused:
                await engine.submit(ask([6] * 20, SamplingParams(n=3, max_tokens=4)))
            assert refused.value.reason == "queue_tokens"
            await _to_the_end(big)

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
            await _to_the_end(first)
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
            *deltas, output = [first, *await _to_the_end(late)]
            assert (output.error_code, output.outputs[0].finish_reason) == ("timeout", FinishReason.TIMEOUT)
            assert 0 < len(output.outputs[0].token_ids) < 60
            assert deltas[-1].finish_reason is FinishReason.TIMEOUT
            assert deltas[-1].error == "its deadline has passed"
            (waited,) = await _to_the_end(queued)
            assert (waited.error_code, waited.outputs[0].token_ids) == ("timeout", [])
            assert [(await _to_the_end(stream))[-1].error for stream in forever] == [None] * 3

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
        assert (await _to_the_end(stream))[-1].error_code == "aborted"

    from liushui.engine import links

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_GOODBYE", 0.2)  # it will not say goodbye by itself
        run(work)


def test_tenants_share_and_see_who_waits() -> None:
    async def work() -> None:
        async with up(in_process("make_slow")) as engine:
            flood = [await engine.submit(ask([n], LONG, tenant="a")) for n in range(20)]
            guest = await engine.submit(ask([77], LONG, tenant="b", priority=3, timeout=50))
            await until(lambda: engine.stats().gauges.running == 4)
            views = {view.request_id: view for view in await engine.requests()}
            assert views[flood[0].request_id].state == "running"
            assert views[guest.request_id].tenant == "b"
            assert views[guest.request_id].state == "waiting"
            assert views[guest.request_id].why.startswith("all 4 places are taken")
            assert 40 < views[guest.request_id].time_left <= 50
            ends: list[str] = []

            async def until_done(stream: Any) -> None:
                await _to_the_end(stream)
                ends.append(stream.request_id)

            await asyncio.gather(*map(until_done, [*flood, guest]))
            assert ends.index(guest.request_id) <= 8

    run(work)


def test_salts_of_tenants_never_meet() -> None:
    pairs = [
        ("", ""),
        ("a", ""),
        ("", "a"),
        ("a", "b"),
        ("ab", ""),
        ("a:", "b"),
        ("a", ":b"),
        ("1:a", ""),
        ("", "1:a:"),
    ]
    assert len({salt(*pair) for pair in pairs}) == len(pairs)

    async def work() -> None:
        async with up(in_process()) as engine:
            prompt = list(range(5, 45))
            cached = [
                (await whole(engine, ask(prompt, tenant=tenant, cache_salt=extra)))[0].num_cached_tokens
                for tenant, extra in [("a", ""), ("a", ""), ("b", ""), ("b", "x"), ("b", "x")]
            ]
            assert cached == [0, 36, 0, 0, 36]

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
            (output,) = await _to_the_end(stream)
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
        output = (await _to_the_end(stream))[-1]
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
            output = (await _to_the_end(stream))[-1]
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


def test_numbers_add_up() -> None:
    async def work() -> None:
        async with up(apart()) as engine:
            outputs = [(await whole(engine, request))[0] for request in REQUESTS]
            stats = engine.stats()
            tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
            assert stats.counters["output_tokens"] == tokens
            assert stats.counters["requests"] == len(REQUESTS)
            assert stats.counters["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)
            assert stats.counters["cached_tokens"] == sum(output.num_cached_tokens for output in outputs) > 0
            assert sum(stats.finished.values()) == sum(len(output.outputs) for output in outputs)
            histograms = stats.histograms
            assert histograms["time_to_first_token"].count == len(REQUESTS)
            assert histograms["step"].count == histograms["step_tokens"].count == stats.counters["steps"]
            assert histograms["answer_tokens"].total == tokens
            assert histograms["inter_token"].count == tokens - sum(len(output.outputs) for output in outputs)
            timings = [output.timings for output in outputs]
            assert all(t.queued >= 0 and t.prefill > 0 and t.decode >= 0 for t in timings)
            assert timings[0].batch_mates == 0
            assert timings[1].batch_mates > 0  # three answers beside each other

    run(work)
