"""`House`: what every endpoint needs, and how a request gets into the engine and out again."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeVar

from starlette.requests import Request

from liushui import __version__
from liushui.engine.outputs import RequestOutput
from liushui.engine.serving import AnswerStream, News, ServeRequest, ServingEngine
from liushui.engine.text import Vocabulary
from liushui.errors import LiushuiError, ModelError, Overloaded
from liushui.server.errors import ApiError, refusal
from liushui.server.keys import KeyRing
from liushui.server.schema.common import Generation
from liushui.server.settings import ServerConfig
from liushui.server.visit import LOG, Visit

T = TypeVar("T")
INLINE_CHARS = 2048
"""Shorter texts are tokenized on the spot; for longer ones a thread is cheaper than making others wait."""


@dataclass
class House:
    """The engine, who may use it, and the words of the model."""

    engine: ServingEngine
    keys: KeyRing
    config: ServerConfig
    guests: dict[str, Visit] = field(default_factory=dict)
    """The engine's name of a request -> who asked for it; unfinished ones."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.engine.tokenizer.raw)

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: the same for the same model, template and version."""
        info = self.engine.info
        facts = f"{__version__}\n{info.model}\n{info.chat_template_hash}\n{info.limits}"
        return f"liushui-{__version__}-{sha256(facts.encode()).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        return self.engine.info.served_names[0]

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 for a model that is not served."""
        names = self.engine.info.served_names
        if name is not None and name not in names:
            message = f"{name!r} is not served here; what is: {', '.join(names)}"
            raise ApiError(404, "model_not_found", message, param="model")

    def check_room(self, visit: Visit) -> None:
        """Before the body is read. Raises `ApiError` 503, and 429 for a quota that is used up."""
        self.keys.quota(visit.key).check()
        with refusals(visit, {}):
            self.engine.check_room()

    def greet(self, request: Request, visit: Visit, body: Generation) -> None:
        """What comes before the work. Raises `ApiError`."""
        visit.request_id = body.request_id or visit.request_id
        visit.timings = bool(body.return_timings) or request.headers.get("x-return-timings", "").lower() == "true"
        self.check_model(body.model)
        visit.facts["model"] = self.name
        with refusals(visit, {}):
            self.engine.check_room()

    async def in_thread(self, size: int, act: Callable[[], T]) -> T:
        """`act()`, off the event loop if it is about a text of more than a few characters."""
        return act() if size <= INLINE_CHARS else await asyncio.to_thread(act)

    @asynccontextmanager
    async def serving(self, visit: Visit, requests: list[ServeRequest]) -> AsyncIterator[list[AnswerStream]]:
        """The requests, accepted: all of them or none. Whatever ends the block ends what is left of them."""
        quota = self.keys.quota(visit.key)
        quota.enter()
        try:
            async with AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(await self.engine.submit(item)) for item in requests]
                visit.streams = streams
                visit.facts["id"] = answer_id(streams)
                self.guests |= {stream.request_id: visit for stream in streams}
                visit.facts["prompt_tokens"] = sum(len(s.prepared.request.prompt_token_ids) for s in streams)
                yield streams
        finally:
            for stream in visit.streams:
                self.guests.pop(stream.request_id, None)
            quota.leave(visit.facts.get("prompt_tokens", 0) + visit.facts.get("completion_tokens", 0))


async def finished(stream: AnswerStream) -> RequestOutput:
    """The output, passing over what comes before it."""
    async for news in stream:
        if isinstance(news, RequestOutput):
            return news
    raise ApiError(500, "internal_error", "the engine ended a request without an output")


async def merged(streams: list[AnswerStream]) -> AsyncIterator[News]:
    """News of several requests as it comes, of each in its order."""
    if len(streams) == 1:
        async for news in streams[0]:
            yield news
        return
    queue: asyncio.Queue[News | BaseException | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AnswerStream) -> None:
        try:
            async for news in stream:
                await queue.put(news)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        left = len(pumps)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@contextmanager
def refusals(visit: Visit, names: Mapping[str, str]) -> Iterator[None]:
    """What the engine refuses, in the client's words. `names`: the engine's field -> the client's."""
    try:
        yield
    except LiushuiError as error:
        if not isinstance(error, Overloaded):
            level = logging.WARNING if isinstance(error, ModelError) else logging.DEBUG
            LOG.log(level, "refused", extra={"facts": {"request_id": visit.request_id, "why": str(error)}})
        raise refusal(error, names) from None


def answer_id(streams: list[AnswerStream]) -> str:
    """The `id` of the answer that these prompts get."""
    name = streams[0].request_id
    return name if len(streams) == 1 else name.rpartition("-")[0]


def new_id(kind: str) -> str:
    """An id that no request had: the answer's, and the engine's."""
    return f"{kind}-{secrets.token_hex(12)}"


def plain_params(params: Any) -> dict[str, Any]:
    """Effective parameters as JSON values, with where each came from if that is known."""
    if hasattr(params, "explained"):
        return dict(params.explained())
    return dict(params)
