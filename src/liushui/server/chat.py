"""POST /v1/chat/completions."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from liushui.engine.outputs import CompletionOutput, RequestOutput, StreamDelta
from liushui.engine.serving import ServeRequest
from liushui.errors import ModelError, ParameterError
from liushui.server.answers import Envelope
from liushui.server.errors import ApiError
from liushui.server.house import House, finished, merged, new_id, refusals
from liushui.server.logprobs import Words, by_token_id, chat_content, chat_rows
from liushui.server.params import sampling_params, serve_request
from liushui.server.schema.chat import ChatRequest, Message
from liushui.server.visit import LOG, Visit
from liushui.server.wire import EventStream, JsonAnswer, read_body, started, visit_of, while_connected

_SHOWN_IF_NAMED = ("name", "tool_calls", "tool_call_id", "reasoning_content")


async def chat_completions(house: House, request: Request) -> Response:
    visit = visit_of(request)
    house.check_room(visit)
    body = await read_body(request, ChatRequest)
    house.greet(request, visit, body)
    talk = Talk(house, visit, body)
    if not body.streams:
        return JsonAnswer(await while_connected(request, talk.answer()), visit)
    events = talk.chunks()
    return EventStream(await started(request, events), visit)


class Talk:
    """One conversation and its answer."""

    def __init__(self, house: House, visit: Visit, body: ChatRequest) -> None:
        self.house = house
        self.visit = visit
        self.body = body
        self.words = Words(house.vocabulary, bool(body.return_tokens_as_token_ids))
        kind = "chat.completion.chunk" if body.streams else "chat.completion"
        self.envelope = Envelope(house, visit, body, new_id("chatcmpl"), kind)
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        self.names = {
            "prompt": "messages",
            "prompt_token_ids": "messages",
            "max_tokens": limit,
            "logprobs": "top_logprobs",
        }

    async def request(self) -> ServeRequest:
        """The conversation as the engine takes it. Raises `ApiError`."""
        body, info = self.body, self.house.engine.info
        if body.streams and body.prompt_logprobs is not None:
            message = "prompt_logprobs: only without stream"
            raise ApiError(400, "invalid_value", message, param="prompt_logprobs")
        with refusals(self.visit, self.names):
            text, ids = await rendered(
                self.house,
                body.messages,
                body.add_generation_prompt is not False,
                body.chat_template_kwargs,
                bool(body.add_special_tokens),
            )
            params = sampling_params(body, info, max_tokens=body.limit, logprobs=body.top)
            return serve_request(body, self.visit, ids, params, self.envelope.answer_id, prompt=text)

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        request = await self.request()
        with refusals(self.visit, self.names):
            async with self.house.serving(self.visit, [request]) as streams:
                output = await finished(streams[0])
                self.envelope.settle([output])
        more: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            more["prompt_logprobs"] = by_token_id(self.words, output.prompt_logprobs or [], self.body.prompt_logprobs)
        if self.body.return_token_ids:
            more["prompt_token_ids"] = output.prompt_token_ids
        choices = [self._choice(item) for item in output.outputs]
        return self.envelope(choices, usage=self.envelope.usage(), **more, **self.envelope.asked_for([output]))

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes: for each choice its role first and its reason last."""
        request = await self.request()
        with refusals(self.visit, self.names):
            async with self.house.serving(self.visit, [request]) as streams:
                prompt_ids = streams[0].prepared.request.prompt_token_ids
                self.envelope.prompt_tokens = len(prompt_ids)
                begun: set[int] = set()
                async with aclosing(merged(streams)) as all_news:  # type: ignore[type-var]
                    async for news in all_news:
                        if isinstance(news, RequestOutput):
                            self.envelope.settle([news])
                            for delta in self.envelope.held:
                                for chunk in self._pieces(delta, begun, prompt_ids):
                                    yield chunk
                            if (last := self.envelope.last_chunk([news])) is not None:
                                yield last
                        elif self.envelope.tellable(news):
                            for chunk in self._pieces(news, begun, prompt_ids):
                                yield chunk

    def _pieces(self, delta: StreamDelta, begun: set[int], prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
        pieces = []
        if delta.output_index not in begun:
            begun.add(delta.output_index)
            choice = self._delta(delta.output_index, {"role": "assistant", "content": ""})
            asked = {"prompt_token_ids": list(prompt_ids)} if self.body.return_token_ids else {}
            pieces.append(self.envelope.chunk(choice, **asked))
        self.envelope.count(delta)
        if not delta.token_ids and not delta.text and delta.finish_reason is None:
            return pieces
        choice = self._delta(delta.output_index, {"content": delta.text} if delta.text else {})
        if delta.logprobs is not None:
            content = chat_content(self.words, delta.token_ids, delta.logprobs, self.body.top or 0)
            choice["logprobs"] = {"content": content, "refusal": None}
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        if delta.finish_reason is not None:
            choice |= {"finish_reason": str(delta.finish_reason), "stop_reason": delta.stop_reason}
        pieces.append(self.envelope.chunk(choice))
        return pieces

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, item: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if item.logprobs is not None:
            content = chat_rows(self.words, item.token_ids, item.logprobs, self.body.top or 0)
            logprobs = {"content": content, "refusal": None}
        choice = {
            "index": item.index,
            "message": {"role": "assistant", "content": item.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": str(item.finish_reason),
            "stop_reason": item.stop_reason,
        }
        return choice | ({"token_ids": item.token_ids} if self.body.return_token_ids else {})


async def rendered(
    house: House,
    messages: list[Message],
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None,
    add_special_tokens: bool = False,
) -> tuple[str, list[int]]:
    """(text, token ids) of a conversation, by the model's chat template. Raises `ApiError`, `ParameterError`."""
    tokenizer = house.engine.tokenizer
    if tokenizer.chat_template is None:
        message = "the model has no chat template; use /v1/completions, or start the server with --chat-template FILE"
        raise ApiError(400, "no_chat_template", message, param="messages")
    plain = shown(messages, tokenizer.chat_template)
    size = sum(len(str(message["content"])) for message in plain)
    render = partial(
        tokenizer.chat, plain, add_generation_prompt=add_generation_prompt, template_kwargs=dict(variables or {})
    )
    try:
        text, ids = await house.in_thread(size, render)
        return text, (await house.in_thread(size, partial(tokenizer.encode, text)) if add_special_tokens else ids)
    except ModelError as error:
        LOG.warning("template", extra={"facts": {"why": str(error)}})
        message = "the model's chat template cannot write these messages; the server's log says why"
        raise ApiError(400, "chat_template_failed", message, param="messages") from None


def shown(messages: list[Message], template: str) -> list[dict[str, Any]]:
    """Messages as the template gets them. Raises `ParameterError` for a field that the template would drop.

    `developer`, OpenAI's newer word for `system`, is said as the template says it.
    """
    plain = []
    for i, message in enumerate(messages):
        made = message.model_dump(include={"role", "content", *_SHOWN_IF_NAMED}, exclude_none=True)
        for name in _SHOWN_IF_NAMED:
            if made.get(name) and not _mentions(template, name):
                what = "the model's chat template does not show it; put it into the content"
                raise ParameterError(f"messages[{i}].{name}", what)
        if message.role == "developer" and not _mentions(template, "developer"):
            made["role"] = "system"
        plain.append(made | {"content": message.content})
    return plain


def _mentions(template: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", template) is not None
