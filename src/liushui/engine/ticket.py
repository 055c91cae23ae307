"""One request on the text side: what has come of it, and the reader that takes it away."""

import asyncio
from typing import Protocol, Self

from liushui.core.request import FinishReason, Request
from liushui.engine.inputs import Prepared
from liushui.engine.live import LiveAnswer, LiveRequest
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.serving import News
from liushui.engine.text import Vocabulary

MOST = 1024
"""Log-probabilities in one delta, each token counting as one more. What is handed out together is written together,
and meanwhile nobody else is served."""


def tokens_together(top: int) -> int:
    """Tokens with `top` log-probabilities each that may be handed out in one piece."""
    return max(1, MOST // (1 + top))


class Desk(Protocol):
    """What a ticket asks of the engine that gave it out."""

    def give_up(self, ticket: "Ticket") -> None:
        """Its reader has left."""
        ...


class Ticket:
    """`AnswerStream`. Nothing is queued for a slow reader: a delta is cut from the answer when it is asked for, so that
    what is unread is kept once, and a reader who comes late gets it in few pieces. A piece is bounded, and before a
    reader gets the next one of what lies ready, others have their turn; the answers of a request take turns too."""

    def __init__(self, desk: Desk, prepared: Prepared, wire: Request, vocab: Vocabulary) -> None:
        """`wire`: the request under the name that the loop knows, which no other attempt has."""
        self.prepared = prepared
        self.wire = wire
        self.live = LiveRequest(prepared, vocab)
        self.output: RequestOutput | None = None
        self.sent = False
        """Its reader has seen a part of the answer."""
        self.attempts = 1
        self.waits = True
        """In the queue, as far as is known here."""
        self.leaving: FinishReason | None = None
        """It was asked to end for this reason."""
        self.timer: asyncio.TimerHandle | None = None
        self.last_token: dict[int, float] = {}
        """Answer -> when its last tokens came."""
        self._desk = desk
        self._most = tokens_together(wire.sampling.logprobs or 0)
        """Tokens in one delta."""
        self._touched: dict[int, LiveAnswer] = {}
        """Answers with something unread, the one that has waited longest first."""
        self._given = 0
        """Tokens handed out since others had a turn."""
        self._woken = asyncio.Event()
        self._over = False

    @property
    def request_id(self) -> str:
        return self.prepared.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, as the queue counts them."""
        request = self.prepared.request
        return len(request.prompt_token_ids) * request.sampling.n

    def restart(self, wire: Request, vocab: Vocabulary) -> None:
        """Forget what came of it; it will come again, the same."""
        self.wire, self.live = wire, LiveRequest(self.prepared, vocab)
        self.attempts += 1
        self._touched.clear()
        self.last_token.clear()

    def touch(self, live: LiveAnswer) -> None:
        """Something came for this answer."""
        if self.prepared.stream:
            self._touched[live.answer.output.index] = live
            self._woken.set()

    def finish(self, output: RequestOutput) -> None:
        self.output = output
        if self.timer is not None:
            self.timer.cancel()
        self._woken.set()

    # -- the reader's side

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> News:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._given >= self._most:
                self._given = 0
                await asyncio.sleep(0)
            while not self._touched and self.output is None:
                self._woken.clear()
                self._given = 0
                await self._woken.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self._touched:
            return self._piece()
        assert self.output is not None  # noqa: S101 (for the type checker)
        self._over = True
        return self.output

    def _piece(self) -> StreamDelta:
        """The next delta."""
        index = next(iter(self._touched))
        live = self._touched.pop(index)
        self.sent = True
        bad = live.answer.output.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT)
        delta = live.answer.delta(self.prepared.index, self.live.error if bad else None, self._most)
        if live.answer.unsent:
            self._touched[index] = live
        self._given += len(delta.token_ids)
        return delta

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            if self.output is None:
                self._desk.give_up(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()
