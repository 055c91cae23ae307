"""The engine process: `python -m liushui.engine.worker SOCKET LIFELINE`, two inherited file descriptors.

Orders and news go over the socket. The lifeline is a pipe on which nothing is ever written: when it ends, whoever
started this process is gone, however that happened, and the process ends too, even in the middle of a step.
"""

import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from importlib import import_module

from liushui.config import EngineConfig, ServingConfig
from liushui.engine import wire
from liushui.engine.attendant import Attendant, Core, Hangup
from liushui.engine.loop import describe
from liushui.engine.messages import Facts, Orders, Setup, Told
from liushui.engine.pacing import pacer
from liushui.errors import LiushuiError

Maker = Callable[[EngineConfig, ServingConfig], Core]


class SocketChannel:
    """`Channel` over a socket that never blocks the loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._poll = select.poll()  # unlike select, knows file descriptors beyond 1,023
        self._frames = wire.Frames()
        self._bodies: deque[bytes] = deque()
        self._out: deque[memoryview] = deque()

    def setup(self) -> Setup:
        """The first message."""
        while not self._bodies:
            self._move(wait=True)
        return wire.setup.decode(self._bodies.popleft())

    def receive(self, *, wait: bool) -> list[Orders]:
        self._move(wait=False)
        while wait and not self._bodies:
            self._move(wait=True)
        batches = [wire.orders.decode(body) for body in self._bodies]
        self._bodies.clear()
        return batches

    def send(self, told: Told | Facts) -> None:
        self._out.append(memoryview(wire.frame(told)))
        self._write()

    def flush(self) -> None:
        """Send all that there is."""
        while self._out:
            self._poll.register(self._socket, select.POLLOUT)
            self._poll.poll()
            self._write()

    def _move(self, *, wait: bool) -> None:
        """Read what is there, write what goes."""
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._out else 0))
        events = sum(found for _, found in self._poll.poll(None if wait else 0))
        if events & select.POLLOUT:
            self._write()
        if events & ~select.POLLOUT:
            try:
                data = self._socket.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError as error:
                raise Hangup from error
            if not data:
                raise Hangup
            self._bodies.extend(self._frames.feed(data))

    def _write(self) -> None:
        while self._out:
            try:
                sent = self._socket.send(self._out[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise Hangup from error
            if sent == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][sent:]


def serve(sock: socket.socket) -> int:
    """Load what the first message names, and attend to it. Returns the exit code."""
    channel = SocketChannel(sock)
    try:
        setup = channel.setup()
        sys.path[:] = [*setup.path]
        try:
            core = _make(setup)
        except Exception as error:
            kind, field = type(error).__name__, getattr(error, "field", "")
            named = kind if isinstance(error, LiushuiError) else ""
            text = str(error).removeprefix(f"{field}: ") if named and field else describe(error)
            channel.send(Facts(error=text, error_kind=named, error_field=field))
            channel.flush()
            return 3
        channel.send(core.facts())
        Attendant(core, channel, pacer(setup.serving)).run()
        channel.flush()
    except Hangup:
        return 0
    return 0


def _make(setup: Setup) -> Core:
    module, _, name = setup.maker.partition(":")
    maker: Maker = getattr(import_module(module), name)
    return maker(setup.config, setup.serving)


def _watch(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(0)


def main(arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the server drains, then says so here
    socket_fd, lifeline = map(int, arguments)
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()
    with socket.socket(fileno=socket_fd) as sock:
        return serve(sock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
