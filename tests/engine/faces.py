"""What the tests of the face for servers share: engines on a thread and in a process of their own, requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from liushui.config import EngineConfig, ServingConfig
from liushui.core.request import SamplingParams
from liushui.engine.inprocess import InProcessEngine
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.process import ProcessEngine
from liushui.engine.serving import ServeRequest
from tests.engine import cores

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, block_size=4, seed=1)
LONG = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)


def in_process(maker: str = "make", model: Any = None, **serving: Any) -> InProcessEngine:
    config, settings = configured(model), ServingConfig(**serving)
    core = getattr(cores, maker)
    return InProcessEngine(config, settings, core=lambda: core(config, settings), text=cores.text)


def apart(maker: str = "make", model: Any = None, **serving: Any) -> ProcessEngine:
    settings = ServingConfig(**serving)
    return ProcessEngine(configured(model), settings, maker=f"tests.engine.cores:{maker}", text=cores.text)


def configured(model: Any) -> EngineConfig:
    return CONFIG if model is None else replace(CONFIG, model=str(model))


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


async def to_the_end(stream: Any) -> list[Any]:
    return [news async for news in stream]
