"""A real model in a process of its own: served answers are the offline ones, bit for bit, in any company."""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from liushui.config import EngineConfig, ServingConfig
from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.engine.process import ProcessEngine
from liushui.engine.serving import ServeRequest
from liushui.errors import ModelError
from tests.cli.conftest import make_model

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "block_size": 4,
    "max_model_len": 96,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "tiny")


def cases() -> list[tuple[str, SamplingParams]]:
    """Prompts that begin alike, of all lengths; parameters of all kinds."""
    rng = random.Random(5)
    found = []
    for number in range(16):
        prompt = "the quick brown fox jumps over the lazy dog "[: rng.randint(4, 40)] + "你好ab"[: rng.randint(1, 4)]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.2]),
            seed=number,
            top_p=rng.choice([1.0, 0.9]),
            n=rng.choice([1, 1, 2]),
            max_tokens=rng.randint(1, 40),
            logprobs=rng.choice([None, 1]),
            prompt_logprobs=rng.choice([None, None, 1]),
            stop=rng.choice([None, None, ["a", "e"]]),
            repetition_penalty=rng.choice([1.0, 1.2]),
        )
        found.append((prompt, params))
    return found


def test_served_is_offline_bit_for_bit(folder: Path) -> None:
    """In a KV cache so small that sequences are preempted, with deadlines, tenants, priorities, bounded steps, and
    with the engine killed in the middle."""
    offline = LLM(str(folder), **SETTINGS)
    prompts, params = zip(*cases(), strict=True)
    expected = offline.generate(list(prompts), list(params), use_tqdm=False)
    tight = EngineConfig(model=str(folder), **SETTINGS, kv_cache_gib=0.00003)

    async def work() -> None:
        engine = ProcessEngine(tight, ServingConfig(target_itl_ms=1.0, ageing=0.01))
        await engine.start()
        try:
            for turn in [*[0] * 8, 1]:
                if not turn and engine.stats().counters["preemptions"]:
                    continue  # whether anyone is preempted is a matter of who comes when: once is enough
                tasks = [asyncio.create_task(one(engine, number, turn)) for number in range(len(prompts))]
                if turn:
                    while not engine.stats().gauges.running:
                        await asyncio.sleep(0.002)
                    os.kill(engine.engine_pid, signal.SIGKILL)  # type: ignore[arg-type]
                for output, right in zip(await asyncio.gather(*tasks), expected, strict=True):
                    assert output.error is None
                    assert output.outputs == right.outputs
                    assert output.prompt_logprobs == right.prompt_logprobs
            assert engine.stats().counters["preemptions"] > 0
            assert engine.stats().counters["engine_restarts"] == 1
            house = engine._meter.house
            assert (house.running, house.waiting, house.free_blocks) == (0, 0, house.num_blocks)
        finally:
            await engine.close()

    async def one(engine: ProcessEngine, number: int, turn: int) -> Any:
        prompt, sampling = prompts[number], params[number]
        ids = await asyncio.to_thread(engine.tokenizer.encode, prompt)
        request = ServeRequest(
            prompt_token_ids=ids,
            prompt=prompt,
            params=sampling,
            stream=not turn and number % 2 == 0,  # who streams is not sent again
            tenant="abc"[number % 3],
            priority=number % 4,
            timeout=200,
        )
        return [news async for news in await engine.submit(request)][-1]

    asyncio.run(asyncio.wait_for(work(), 250))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    async def work() -> None:
        engine = ProcessEngine(EngineConfig(model=str(tmp_path)))
        with pytest.raises(ModelError):
            await engine.start()
        assert engine.engine_pid is None
        await engine.close()

    asyncio.run(work())
