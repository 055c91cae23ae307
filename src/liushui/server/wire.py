"""Bytes in, bytes out: bodies that are bounded, events that stop when nobody listens."""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from liushui.server.errors import ApiError
from liushui.server.pieces import pieces
from liushui.server.schema.common import MAX_LISTS, MAX_VALUES, Body
from liushui.server.visit import LOG, VISIT, Visit

T = TypeVar("T")
B = TypeVar("B", bound=Body)
INLINE_BYTES = 64 * 1024
"""A longer body is read on a thread."""
_TEXT = re.compile(rb'(?>[^"\\]+|\\.){0,8192}+("?)', re.DOTALL)
"""The rest of a JSON text or, without the quotation mark, a part of it."""
GONE = 499
"""Status in the log and the metrics for a client that left (nginx's word)."""


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


async def read_body(request: Request, kind: type[B]) -> B:
    """The body, checked. Raises `ApiError`: 415 another type, 413 too much, 408 too slow, 400 no JSON or a wrong field.

    What holds the interpreter lock is bounded: by the number of values, which is looked at before any is made."""
    body = await _received(request)

    def read() -> B:
        check_values(body)
        try:
            value = from_json(body)  # NaN and infinities come through here, so that the schema can name the field
        except ValueError as error:
            raise ApiError(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from None
        return kind.read(value)

    return read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)


async def _received(request: Request) -> bytes:
    visit = visit_of(request)
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != "application/json":
        raise ApiError(415, "unsupported_media_type", "send JSON, with the header Content-Type: application/json")
    too_large = ApiError(413, "body_too_large", f"the body may have at most {visit.max_body:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > visit.max_body):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(visit.body_timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > visit.max_body:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"the body took longer than {visit.body_timeout:g} seconds") from None


def check_values(body: bytes) -> None:
    """Raises `ApiError` 413 for more values than a request can have use for: each becomes an object in memory, and they
    are made in one go. What stands inside texts is not counted; that is looked at only if there is much."""
    if _few(_counts(body)):
        return
    counts: tuple[int, ...] = (0, 0, 0)
    place = 0
    few = body.count(b'"') - body.count(b'\\"') <= 4 * MAX_LISTS
    while few and place < len(body):  # a bounded piece at a time: others have their turn
        end = body.find(b'"', place, place + INLINE_BYTES)
        piece = body[place : place + INLINE_BYTES if end < 0 else end]
        counts = tuple(map(sum, zip(counts, _counts(piece), strict=True)))
        few, place = _few(counts), place + len(piece)
        text = end >= 0
        place += text
        while text and (match := _TEXT.match(body, place)) is not None and match.end() > place:
            text, place = not match[1], match.end()
    if not few:
        message = f"the body has too many parts: at most {MAX_VALUES:,} values, {MAX_LISTS:,} lists and objects"
        raise ApiError(413, "body_too_large", message)


def _counts(piece: bytes) -> tuple[int, ...]:
    """At least as many (values, lists and objects, names in objects)."""
    lists = piece.count(b"[") + piece.count(b"{")
    return lists + piece.count(b","), lists, piece.count(b":")


def _few(counts: tuple[int, ...]) -> bool:
    values, lists, names = counts
    return values <= MAX_VALUES and lists <= MAX_LISTS and names <= MAX_LISTS


def visit_of(request: Request) -> Visit:
    visit: Visit = request.scope[VISIT]
    return visit


class JsonResponse(Response):
    """JSON by pydantic's encoder. Numbers are finite by then."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. When the client leaves, `work` is cancelled and `ClientGoneError` raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await _cancel(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel, and wait until that is done: what a task holds is given back before we go on."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def started(request: Request, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """`events`, the first of them waited for: what goes wrong until then is an answer with a status of its own."""

    async def first() -> Any:
        return await anext(events)

    try:
        event = await while_connected(request, first())
    except BaseException:
        await events.aclose()  # type: ignore[attr-defined]
        raise

    async def all_events() -> AsyncIterator[Any]:
        async with aclosing(events):  # type: ignore[type-var]
            yield event
            async for later in events:
                yield later

    return all_events()


class Written(ABC, Response):
    """An answer in parts, each of which the client takes within `Visit.write_timeout` seconds, or is given up."""

    headers_of_kind: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, visit: Visit) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(self.headers_of_kind)
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                raise ClientGoneError
        except (TimeoutError, OSError, ClientGoneError):
            self._visit.status, self._visit.code = GONE, "client_gone"
        finally:
            await _cancel(writing, gone)
            await self._close()

    @abstractmethod
    async def _write(self, send: Send) -> None:
        """All of it."""

    async def _close(self) -> None:
        """Whatever happened."""

    async def _send(self, send: Send, data: bytes, last: bool = False) -> None:
        async with asyncio.timeout(self._visit.write_timeout):
            await send({"type": "http.response.body", "body": data, "more_body": not last})


class JsonAnswer(Written):
    """JSON in which there may be `Rows`. A short one is written at once; a long one is made while it is written, and
    after each piece others have their turn."""

    headers_of_kind = ((b"content-type", b"application/json"),)

    def __init__(self, content: Any, visit: Visit) -> None:
        super().__init__(visit)
        self._content = content

    async def _write(self, send: Send) -> None:
        made = pieces(self._content)
        piece, following = next(made), next(made, None)
        if following is None:
            self.raw_headers.append((b"content-length", b"%d" % len(piece)))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while following is not None:
            await self._send(send, piece)
            await asyncio.sleep(0)
            piece, following = following, next(made, None)
        await self._send(send, piece, last=True)


class EventStream(Written):
    """Server-sent events, ended by `data: [DONE]`. `events`: JSON values; closed in any case."""

    headers_of_kind = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))

    def __init__(self, events: AsyncIterator[Any], visit: Visit) -> None:
        super().__init__(visit)
        self._events = events

    async def _close(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined]

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._send(send, b"data: " + to_json(event) + b"\n\n")
        except ApiError as error:
            self._visit.code = error.code
            await self._send(send, b"data: " + to_json(error.body()) + b"\n\n")
        except Exception:
            LOG.exception("failed", extra={"facts": self._visit.record()})
            self._visit.code = "internal_error"
            body = ApiError(500, "internal_error", "the answer broke off; the server's log says why").body()
            await self._send(send, b"data: " + to_json(body) + b"\n\n")
        await self._send(send, b"data: [DONE]\n\n", last=True)
