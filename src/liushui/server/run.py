"""Start, serve, stop.

first SIGTERM or SIGINT     refuse what is new (503), finish what is under way, leave as soon as idle
second                      leave at once
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from liushui.engine.serving import ServingEngine
from liushui.errors import LiushuiError, ParameterError
from liushui.server.app import build_app
from liushui.server.keys import KeyRing
from liushui.server.settings import ServerConfig
from liushui.server.visit import LOG, set_up_logging

if TYPE_CHECKING:
    from liushui.server.otlp import Traces

BACKLOG = 2048
KEEP_ALIVE = 75
"""Seconds an idle connection is kept; longer than clients keep theirs, so that none is closed under a request."""
MAX_HEADERS = 32 * 1024
"""Bytes of a request line and its headers."""
LAST_WORDS = 5
"""Seconds that connections have to take the rest of their answers, after the engine is idle."""
LAST_SPANS = 0.5
"""Seconds that spans have to get away, if the answers under way have used up `drain_timeout`."""


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket. Raises `ParameterError`."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio turns Nagle off only where the socket itself says TCP; without that a small chunk waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it: unread data is not kept for ever
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.write_timeout * 1000))
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        message = f"cannot listen on {config.host} port {config.port} ({error.strerror or error}); choose another"
        raise ParameterError("port", message) from None


def address(listener: socket.socket) -> str:
    """http://host:port of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(engine: ServingEngine, config: ServerConfig, started: Callable[[str], None]) -> None:
    """Serve until a signal says stop. `started` is told the address. Raises `LiushuiError` if it cannot start."""
    config.validate()
    keys = KeyRing.load(config)
    set_up_logging(config.log_format == "json")
    traces = _traces(config.traces_url)
    with bind(config) as listener:
        stop = _signals()
        try:
            await engine.start()
            await _until_stopped(engine, config, keys, listener, stop, started, traces)
        finally:
            await engine.close()


async def _until_stopped(
    engine: ServingEngine,
    config: ServerConfig,
    keys: KeyRing,
    listener: socket.socket,
    stop: asyncio.Event,
    started: Callable[[str], None],
    traces: "Traces | None" = None,
) -> None:
    server = _Server(
        uvicorn.Config(
            build_app(engine, config, keys, traces),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LAST_WORDS,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if not serving.done():
            started(address(listener))
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        limit = time.monotonic() + config.drain_timeout
        if not serving.done():
            LOG.info("draining", extra={"facts": {"unfinished": engine.stats().gauges.unfinished_requests}})
            if not await engine.drain(config.drain_timeout):
                LOG.warning("drain_timeout", extra={"facts": {"seconds": config.drain_timeout}})
        server.should_exit = True
        await serving
        if traces is not None:
            await traces.close(min(LAST_WORDS, max(LAST_SPANS, limit - time.monotonic())))
        LOG.info("stopped")
    finally:
        stopping.cancel()


def _traces(url: str | None) -> "Traces | None":
    if url is None:
        return None
    from liushui.server.otlp import Traces

    return Traces.to(url)


def _signals() -> asyncio.Event:
    """An event that the first signal to stop sets; the second ends the process."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def main(make_engine: Callable[[], ServingEngine], config: ServerConfig, started: Callable[[str], None]) -> None:
    """`serve`, from a program that has no event loop."""

    async def run() -> None:
        await serve(make_engine(), config, started)

    try:
        asyncio.run(run())
    except asyncio.CancelledError:
        raise LiushuiError("the server was cancelled") from None
