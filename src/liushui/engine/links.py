"""How the text side reaches a token loop: on a thread of this process, or in a process of its own.

link = ProcessLink(config, serving, "liushui.engine.startup:make_core")
facts = await link.start(on_told, on_death)      # on the event loop's thread, as are the two callbacks
link.send(Orders(...))                           # never blocks
await link.close()
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from liushui import errors
from liushui.config import EngineConfig, ServingConfig
from liushui.engine.attendant import Attendant, Core
from liushui.engine.loop import describe
from liushui.engine.messages import Facts, Orders, Setup, Told
from liushui.engine.pacing import pacer
from liushui.engine.supervision import Watch, signs
from liushui.errors import LiushuiError, ModelError

if TYPE_CHECKING:
    from liushui.engine import wire

OnTold = Callable[[Told], None]
OnDeath = Callable[[str], None]
_GOODBYE = 5.0
"""Seconds for a process to end by itself before it is killed."""
_TURN = 0.005
"""Seconds that news are passed on before others have their turn on the event loop."""


class Link(Protocol):
    """A token loop somewhere."""

    restarts: bool
    """Whether `start` may be called again after a death."""
    watch: Watch
    """What the loop owes."""

    async def start(self, on_told: OnTold, on_death: OnDeath) -> Facts:
        """Bring it up. `on_death`: called once, with why, if it ends without being asked. Raises `LiushuiError`."""
        ...

    def send(self, orders: Orders) -> None: ...

    async def close(self) -> None:
        """End it, whatever state it is in."""
        ...


class ThreadLink:
    """The loop on a thread: nothing to install, nothing to spawn; text and steps share one interpreter lock."""

    restarts = False

    def __init__(self, make: Callable[[], Core], serving: ServingConfig) -> None:
        self._make = make
        self._serving = serving
        self.watch = Watch(serving.hang_timeout)
        self._orders: deque[Orders] = deque()
        self._wake = threading.Condition()
        self._news: deque[Callable[[], None]] = deque()
        self._hearing = False
        """Somebody will look at the news."""
        self._thread: threading.Thread | None = None
        self.core: Core | None = None

    async def start(self, on_told: OnTold, on_death: OnDeath) -> Facts:
        self._loop = asyncio.get_running_loop()
        self._on_told, self._on_death = on_told, on_death
        core = self.core = await asyncio.to_thread(self._make)
        self._thread = threading.Thread(target=self._run, args=(core,), name="liushui-engine", daemon=True)
        self._thread.start()
        return core.facts()

    def send(self, orders: Orders) -> None:
        self.watch.sent(orders)
        with self._wake:
            self._orders.append(orders)
            self._wake.notify()

    async def close(self) -> None:
        if self._thread is not None:
            self.send(Orders(close=True))
            await asyncio.to_thread(self._thread.join)

    # -- on the thread

    def _run(self, core: Core) -> None:
        try:
            Attendant(core, _ThreadChannel(self), pacer(self._serving)).run()
        except BaseException as error:
            self._pass_on(partial(self._on_death, f"the engine's thread ended: {describe(error)}"))
            raise

    def take(self, wait: bool) -> list[Orders]:
        with self._wake:
            while wait and not self._orders:
                self._wake.wait()
            batches = list(self._orders)
            self._orders.clear()
        return batches

    def tell(self, told: Told) -> None:
        self._pass_on(partial(self._heard, told))

    def _pass_on(self, news: Callable[[], None]) -> None:
        with self._wake:
            self._news.append(news)
            if self._hearing:
                return
            self._hearing = True
        with suppress(RuntimeError):  # the event loop may be closed
            self._loop.call_soon_threadsafe(self._hear)

    # -- on the event loop

    def _heard(self, told: Told) -> None:
        self.watch.heard(told)
        self._on_told(told)

    def _hear(self) -> None:
        """Pass on what has come, in order, for one turn; if there is more, again after the others' turn."""
        end = time.monotonic() + _TURN
        try:
            while self._news:
                self._news.popleft()()
                if time.monotonic() >= end:
                    break
        finally:
            with self._wake:
                self._hearing = more = bool(self._news)
            if more:
                self._loop.call_soon(self._hear)


class _ThreadChannel:
    """`attendant.Channel`."""

    def __init__(self, link: ThreadLink) -> None:
        self._link = link

    def receive(self, *, wait: bool) -> list[Orders]:
        return self._link.take(wait)

    def send(self, told: Told) -> None:
        self._link.tell(told)


class ProcessLink:
    """The loop in a process of its own, over an inherited socket; see `worker`. One that hangs is killed: then it is
    dead like any other."""

    restarts = True

    def __init__(self, config: EngineConfig, serving: ServingConfig, maker: str) -> None:
        """`maker`: module:function that makes the `Core`, in that process."""
        self._setup = Setup(config, serving, maker, tuple(sys.path))
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._hung = ""
        """Why it was killed."""
        self.watch = Watch(serving.hang_timeout, lambda: signs(self.pid))
        self._lifeline = -1

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, on_told: OnTold, on_death: OnDeath) -> Facts:
        from liushui.engine import wire

        await self.close()
        reader = await self._spawn()
        assert self._writer is not None  # noqa: S101 (for the type checker)
        frames = wire.Frames()
        try:
            self._writer.write(wire.frame(self._setup))
            bodies: list[bytes] = []
            while not bodies:
                data = await reader.read(1 << 16)
                if not data:
                    raise ModelError(f"the engine process ended while it loaded the model: {await self._end()}")
                bodies = frames.feed(data)
        except BaseException:
            await self.close()
            raise
        self.watch.ready()
        facts = wire.facts.decode(bodies[0])
        if facts.error is not None:
            await self.close()
            raise _refusal(facts)
        self._reading = asyncio.create_task(self._read(reader, frames, on_told, on_death))
        return facts

    def send(self, orders: Orders) -> None:
        from liushui.engine import wire

        if self._writer is not None:
            self.watch.sent(orders)
            self._writer.write(wire.frame(orders))

    async def close(self) -> None:
        process, tasks = self._process, (self._reading, self._watching)
        self._process = self._reading = self._watching = None
        for task in tasks:
            if task is not None:
                task.cancel()
        if self._writer is not None:
            with suppress(ConnectionError, RuntimeError):
                self.send(Orders(close=True))
                self._writer.close()
            self._writer = None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if process is not None:
            try:
                await asyncio.wait_for(process.wait(), _GOODBYE)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _spawn(self) -> asyncio.StreamReader:
        """Start the process; both its descriptors are inherited, and closed here."""
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "liushui.engine.worker",
                str(theirs.fileno()),
                str(lifeline),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self.watch.starts()
        self._watching = asyncio.create_task(self._supervise(self._process))
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _supervise(self, process: asyncio.subprocess.Process) -> None:
        """Kill it if it hangs; whoever reads from it finds out."""
        self._hung = ""
        while not self._hung:
            await asyncio.sleep(self.watch.period)
            self._hung = self.watch.look()
        with suppress(ProcessLookupError):
            process.kill()

    async def _read(
        self, reader: asyncio.StreamReader, frames: "wire.Frames", on_told: OnTold, on_death: OnDeath
    ) -> None:
        from liushui.engine import wire

        why = ""
        try:
            end = time.monotonic() + _TURN
            while data := await reader.read(1 << 20):
                for body in frames.feed(data):
                    told = wire.told.decode(body)
                    self.watch.heard(told)
                    on_told(told)
                    if time.monotonic() >= end:
                        await asyncio.sleep(0)
                        end = time.monotonic() + _TURN
        except ConnectionError:
            pass  # a process that was killed leaves it unread
        except Exception as error:  # whatever it is, nobody may wait for ever
            why = f"what it said cannot be read ({describe(error)}); "
        self._reading = None
        on_death(f"the engine process ended: {why}{await self._end()}")

    async def _end(self) -> str:
        """Make sure that the process is gone; how it ended, in words."""
        process = self._process
        if self._watching is not None:
            self._watching.cancel()
        if process is None:
            return "it was closed"
        try:
            code = await asyncio.wait_for(process.wait(), 1.0)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
        if self._hung:
            return f"it was killed, because {self._hung}"
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"


def _refusal(facts: Facts) -> LiushuiError:
    """The error of the other process, in this one."""
    kind = getattr(errors, facts.error_kind, None) if facts.error_kind else None
    message = facts.error or ""
    if kind is None:
        return ModelError(f"the engine cannot start: {message}")
    if issubclass(kind, errors.ParameterError):
        refusal: LiushuiError = kind(facts.error_field, message)
        return refusal
    made: LiushuiError = kind(message)
    return made
