"""POST /v1/completions: one prompt or many, each with n answers. Choice p * n + i is answer i of prompt p."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from liushui.engine.outputs import CompletionOutput, RequestOutput, StreamDelta, TokenLogprob
from liushui.engine.serving import AnswerStream, ServeRequest
from liushui.server.answers import Envelope
from liushui.server.errors import ApiError
from liushui.server.house import House, finished, merged, new_id, refusals
from liushui.server.logprobs import LegacyLogprobs, Words, by_token_id
from liushui.server.params import sampling_params, serve_request
from liushui.server.pieces import Rows
from liushui.server.schema.completions import CompletionRequest
from liushui.server.visit import Visit
from liushui.server.wire import EventStream, JsonAnswer, read_body, started, visit_of, while_connected

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completions(house: House, request: Request) -> Response:
    visit = visit_of(request)
    house.check_room(visit)
    body = await read_body(request, CompletionRequest)
    house.greet(request, visit, body)
    job = Completion(house, visit, body)
    if not body.streams:
        return JsonAnswer(await while_connected(request, job.answer()), visit)
    return EventStream(await started(request, job.chunks()), visit)


class Completion:
    """The prompts of one body and their answers."""

    def __init__(self, house: House, visit: Visit, body: CompletionRequest) -> None:
        self.house = house
        self.visit = visit
        self.body = body
        self.words = Words(house.vocabulary, bool(body.return_tokens_as_token_ids))
        self.envelope = Envelope(house, visit, body, new_id("cmpl"), "text_completion")
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        self.names = {"prompt_token_ids": "prompt", "max_tokens": limit}
        self.silent = body.max_tokens == 0
        """Nothing but the prompt is wanted: one token is made, and not shown."""

    async def requests(self) -> list[ServeRequest]:
        """The prompts as the engine takes them. Raises `ApiError`."""
        body = self.body
        for name in ("prompt_logprobs", "logprobs"):
            if body.streams and getattr(body, name) is not None and (body.echo or name == "prompt_logprobs"):
                what = f"{name}: log-probabilities of a prompt only without stream"
                raise ApiError(400, "invalid_value", what, param=name)
        asked = 1 if self.silent else body.limit
        with refusals(self.visit, self.names):
            params = sampling_params(
                body,
                self.house.engine.info,
                max_tokens=asked or DEFAULT_MAX_TOKENS,
                logprobs=body.logprobs,
                **({"prompt_logprobs": self._prompt_top()} if body.echo else {}),
            )
            made = []
            for index, prompt in enumerate(body.prompt):
                text, ids = await self._encoded(prompt)
                request_id = self.envelope.answer_id if len(body.prompt) == 1 else f"{self.envelope.answer_id}-{index}"
                made.append(serve_request(body, self.visit, ids, params, request_id, index=index, prompt=text))
            return made

    def _prompt_top(self) -> int | None:
        """Log-probabilities of the prompt: asked for by themselves, or by echo with logprobs."""
        found = [top for top in (self.body.logprobs, self.body.prompt_logprobs) if top is not None]
        return max(found, default=None)

    async def _encoded(self, prompt: str | list[int]) -> tuple[str | None, list[int]]:
        if isinstance(prompt, list):
            return None, prompt
        encode = partial(self.house.engine.tokenizer.encode, prompt, self.body.add_special_tokens is not False)
        return prompt, await self.house.in_thread(len(prompt), encode)

    async def answer(self) -> dict[str, Any]:
        """All answers."""
        requests = await self.requests()
        with refusals(self.visit, self.names):
            async with self.house.serving(self.visit, requests) as streams:
                outputs = [await finished(stream) for stream in streams]
                self.envelope.settle(outputs)
        self._count()
        choices = [self._choice(output, item) for output in outputs for item in output.outputs]
        return self.envelope(choices, usage=self.envelope.usage(), **self.envelope.asked_for(outputs))

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answers as they come, each in its order."""
        requests = await self.requests()
        with refusals(self.visit, self.names):
            async with self.house.serving(self.visit, requests) as streams:
                self.envelope.prompt_tokens = self.visit.facts["prompt_tokens"]
                told = {index: Told(self, stream) for index, stream in enumerate(streams)}
                outputs: list[RequestOutput] = []
                async with aclosing(merged(streams)) as all_news:  # type: ignore[type-var]
                    async for news in all_news:
                        if isinstance(news, RequestOutput):
                            outputs.append(news)
                            self.envelope.check(news)
                        elif self.envelope.tellable(news):
                            yield self._chunk(news, told[news.index])
                self.envelope.settle(sorted(outputs, key=lambda output: output.index))
                for delta in self.envelope.held:
                    yield self._chunk(delta, told[delta.index])
                self._count()
                if (last := self.envelope.last_chunk(outputs)) is not None:
                    yield last

    def _count(self) -> None:
        if self.silent:
            self.envelope.completion_tokens = 0

    def _chunk(self, delta: StreamDelta, told: "Told") -> dict[str, Any]:
        self.envelope.count(delta)
        choice = self._empty(delta.index, delta.output_index) | told.piece(delta)
        if delta.finish_reason is not None:
            choice |= {"finish_reason": self._reason(delta.finish_reason), "stop_reason": delta.stop_reason}
        return self.envelope.chunk(choice)

    def _empty(self, index: int, output_index: int) -> dict[str, Any]:
        place = index * self.body.answers + output_index
        return {"index": place, "text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}

    def _reason(self, reason: Any) -> str:
        return "length" if self.silent else str(reason)

    def _choice(self, output: RequestOutput, item: CompletionOutput) -> dict[str, Any]:
        body, text = self.body, "" if self.silent else item.text
        choice = self._empty(output.index, item.index)
        choice |= {"finish_reason": self._reason(item.finish_reason), "stop_reason": item.stop_reason}
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(output, item)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = by_token_id(self.words, output.prompt_logprobs or [], body.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": [] if self.silent else item.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return choice | {"text": self.echoed(output.prompt, output.prompt_token_ids, output.truncated_tokens) + text}

    def _logprobs(self, output: RequestOutput, item: CompletionOutput) -> dict[str, Rows]:
        ids: list[int] = [*output.prompt_token_ids] if self.body.echo else []
        entries: list[TokenLogprob | None] = [*(output.prompt_logprobs or [])] if self.body.echo else []
        if not self.silent:
            ids += item.token_ids
            entries += item.logprobs or []
        return self.legacy().rows(ids, entries)

    def legacy(self) -> LegacyLogprobs:
        """The writer of one choice's arrays."""
        skip = self.body.skip_special_tokens is not False
        return LegacyLogprobs(self.words, self.house.vocabulary, self.body.logprobs or 0, skip_special_tokens=skip)

    def echoed(self, prompt: str | None, ids: list[int], truncated: int) -> str:
        """The prompt's text in front of an answer: as it was sent, if it was text and is whole."""
        if not self.body.echo:
            return ""
        if prompt is not None and not truncated:
            return prompt
        return self.house.engine.tokenizer.decode(ids, skip_special_tokens=self.body.skip_special_tokens is not False)


class Told:
    """What of one prompt's answers was sent."""

    def __init__(self, job: Completion, stream: AnswerStream) -> None:
        self._job = job
        self._prepared = stream.prepared
        self._legacy: dict[int, LegacyLogprobs] = {}

    def piece(self, delta: StreamDelta) -> dict[str, Any]:
        """The fields that this delta sets."""
        job, first = self._job, delta.output_index not in self._legacy
        writer = self._legacy.setdefault(delta.output_index, job.legacy())
        made: dict[str, Any] = {"text": "" if job.silent else delta.text}
        if first and job.body.echo:
            ids = list(self._prepared.request.prompt_token_ids)
            made["text"] = job.echoed(self._prepared.prompt, ids, self._prepared.truncated_tokens) + made["text"]
        if delta.logprobs is not None:
            made["logprobs"] = writer.piece(delta.token_ids, delta.logprobs)
        if job.body.return_token_ids:
            made["token_ids"] = [] if job.silent else list(delta.token_ids)
            if first:
                made["prompt_token_ids"] = list(self._prepared.request.prompt_token_ids)
        return made
