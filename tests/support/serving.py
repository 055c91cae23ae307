"""A server on a thread of the test, around any engine, on a port of its own."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from liushui.config import EngineConfig, ServingConfig
from liushui.engine.inprocess import InProcessEngine
from liushui.engine.startup import join
from liushui.server.app import build_app
from liushui.server.keys import KeyRing
from liushui.server.run import _until_stopped, bind
from liushui.server.settings import ServerConfig
from tests.engine.scripted import VOCAB_SIZE, ScriptedExecutor, make_engine, tiny_tokenizer

__all__ = ["Running", "build_app", "events", "running", "scripted", "tiny_engine"]

NAME = "tiny"


def scripted(
    executor: ScriptedExecutor | None = None, serving: ServingConfig | None = None, **settings: Any
) -> InProcessEngine:
    """An engine that follows a script; `executor.model` says what."""
    settings = {"max_model_len": 256, "num_blocks": 256, "log_limit": 1000} | settings
    config = EngineConfig(model=NAME, max_num_seqs=settings.get("max_num_seqs", 4))
    return InProcessEngine.around(make_engine(executor, **settings), tiny_tokenizer(), config, serving)


def tiny_engine(**settings: Any) -> InProcessEngine:
    """A tiny random Llama."""
    from tests.support import tiny

    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "block_size": 4}
    config = EngineConfig(model=NAME, **(sizes | settings)).validate()
    runner = tiny.runner(tiny.oracle("llama", vocab_size=VOCAB_SIZE), **{name: getattr(config, name) for name in sizes})
    engine = join(config, runner, tiny_tokenizer())
    return InProcessEngine.around(engine, tiny_tokenizer(), config)


class Running:
    """A server that runs. `engine` is behind it; `call` runs a coroutine on its event loop."""

    def __init__(self, engine: Any, url: str, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        self.engine = engine
        self.url = url
        self.stop = stop
        self._loop = loop
        self.client = httpx.Client(base_url=url, timeout=60)

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]} | fields)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt} | fields)


@contextmanager
def running(engine: Any, keys: KeyRing | None = None, traces: Any = None, **settings: Any) -> Iterator[Running]:
    """Serve `engine` until the block ends, or until `.stop()`: then it drains, as after a signal."""
    config = ServerConfig(port=0, **settings)
    ready, box = threading.Event(), {}

    async def serve() -> None:
        stop = asyncio.Event()
        box["loop"], box["stop"] = asyncio.get_running_loop(), stop

        def started(address: str) -> None:
            box["url"] = address
            ready.set()

        try:
            await engine.start()
            with bind(config) as listener:
                ring = KeyRing.load(config) if keys is None else keys
                await _until_stopped(engine, config, ring, listener, stop, started, traces)
        finally:
            await engine.close()
            ready.set()

    thread = threading.Thread(target=lambda: box.update(end=asyncio.run(serve())), daemon=True)
    thread.start()
    assert ready.wait(60)
    assert "url" in box, "the server did not start"

    def stop() -> None:
        box["loop"].call_soon_threadsafe(box["stop"].set)

    server = Running(engine, box["url"], box["loop"], stop)
    try:
        yield server
    finally:
        server.client.close()
        if thread.is_alive():
            stop()
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def events(text: str) -> list[Any]:
    """The JSON values of a stream; it must end with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), text
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
