"""The face for servers, with a scripted model on a thread and in a process of its own: same answers, nobody waits."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.serving import salt
from tests.engine import cores
from tests.engine.faces import LONG, apart, ask, in_process, run, to_the_end, until, up, whole
from tests.engine.scripted import make_engine, run_all

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
            output = (await to_the_end(stream))[-1]
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
                reader = asyncio.create_task(to_the_end(stream))
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
                await to_the_end(stream)
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
