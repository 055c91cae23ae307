"""The client: requests leave when they are due, whether or not the ones before are answered (open loop).

A client that waits for answers slows down with the server and hides its queue (coordinated omission).
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from liushui.bench.workload import Ask
from liushui.errors import LiushuiError


@dataclass(slots=True)
class Seen:
    """One request as its client saw it. Times in seconds after the start of the run."""

    due: float
    sent: float = 0.0
    """Later than due by what the client itself was late."""
    first: float | None = None
    last: float | None = None
    status: int = 0
    error: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    """Between two chunks with text."""
    answered: float | None = None
    """When the whole answer was there, if it was no stream but a status."""

    @property
    def refused(self) -> float | None:
        """From when it was due until its 503 was there, if it was refused for want of room."""
        return None if self.status != 503 or self.answered is None else self.answered - self.due

    @property
    def ok(self) -> bool:
        return self.error is None and self.first is not None

    @property
    def ttft(self) -> float | None:
        """From when it was due: a late client does not flatter the server."""
        return None if self.first is None else self.first - self.due

    @property
    def total(self) -> float | None:
        return None if self.last is None else self.last - self.due


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to ask."""

    base_url: str
    """With /v1, as for OpenAI's client."""
    model: str
    api_key: str | None = None
    chat: bool = True
    timeout: float = 600.0
    """Seconds."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body, such as ignore_eos."""

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/{'chat/completions' if self.chat else 'completions'}"

    def body(self, ask: Ask) -> dict[str, Any]:
        body = {"model": self.model, "max_tokens": ask.max_tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **self.extra}
        if not self.chat:
            return body | {"prompt": ask.prompt}
        messages = [{"role": "user", "content": ask.prompt}] if isinstance(ask.prompt, str) else ask.prompt
        return body | {"messages": messages}


async def run(asks: Sequence[Ask], target: Target, told: Callable[[Seen], None] = lambda seen: None) -> list[Seen]:
    """Send all, each when it is due; what became of them, in order. `told`: called with each that ends."""
    try:
        import aiohttp
    except ImportError:
        raise LiushuiError("bench serve needs aiohttp: pip install 'liushui[bench]'") from None
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        start = time.perf_counter()

        async def one(ask: Ask) -> Seen:
            seen = Seen(ask.at)
            await asyncio.sleep(max(0.0, start + ask.at - time.perf_counter()))
            seen.sent = time.perf_counter() - start
            try:
                await _ask(session, target, ask, seen, start)
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
                seen.error = f"{type(error).__name__}: {error}"[:200]
            told(seen)
            return seen

        return list(await asyncio.gather(*(one(ask) for ask in asks)))


async def _ask(session: Any, target: Target, ask: Ask, seen: Seen, start: float) -> None:
    async with session.post(target.url, json=target.body(ask)) as response:
        seen.status = response.status
        if response.status != 200:
            seen.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            seen.answered = time.perf_counter() - start
            return
        async for line in response.content:
            if line.startswith(b"data: "):
                _take(line[6:].strip(), seen, time.perf_counter() - start)
    if seen.error is None and seen.first is None:
        seen.error = "an answer without text"


def _take(data: bytes, seen: Seen, now: float) -> None:
    """One event. A chunk may hold several tokens: the usage at the end has their number."""
    if data == b"[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        seen.error = str(event["error"])[:200]
        return
    if usage := event.get("usage"):
        seen.prompt_tokens, seen.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        text = choice.get("text") or choice.get("delta", {}).get("content")
        if text or choice.get("finish_reason"):
            if seen.first is None:
                seen.first = now
            elif text and seen.last is not None:
                seen.gaps.append(now - seen.last)
            seen.last = now
