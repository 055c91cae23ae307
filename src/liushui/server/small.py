"""The small endpoints: models, tokenize, detokenize, health, ready, metrics, debug."""

from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from liushui.server.chat import rendered
from liushui.server.errors import ApiError
from liushui.server.house import House, refusals
from liushui.server.metrics import CONTENT_TYPE, Metrics
from liushui.server.schema.tokenize import DetokenizeRequest, TokenizeRequest
from liushui.server.wire import JsonResponse, read_body, visit_of


def model_card(house: House, name: str, created: int) -> dict[str, Any]:
    """One entry of /v1/models; `max_model_len` and `root` as in vLLM."""
    info = house.engine.info
    card = {"id": name, "object": "model", "created": created, "owned_by": "liushui"}
    return card | {"root": info.model, "max_model_len": info.limits.longest}


async def tokenize(house: House, request: Request) -> Response:
    visit = visit_of(request)
    body = await read_body(request, TokenizeRequest)
    house.check_model(body.model)
    tokenizer = house.engine.tokenizer
    with refusals(visit, {"prompt_token_ids": "prompt"}):
        if body.messages is not None:
            generation = body.add_generation_prompt is not False
            special = bool(body.add_special_tokens)
            _, ids = await rendered(house, body.messages, generation, body.chat_template_kwargs, special)
        else:
            text = body.prompt or ""
            encode = partial(tokenizer.encode, text, body.add_special_tokens is not False)
            ids = await house.in_thread(len(text), encode)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": house.engine.info.limits.longest, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = await house.in_thread(len(ids), lambda: [tokenizer.id_to_text(token) for token in ids])
    return JsonResponse(found)


async def detokenize(house: House, request: Request) -> Response:
    body = await read_body(request, DetokenizeRequest)
    house.check_model(body.model)
    size = house.engine.info.limits.vocab_size
    wrong = next((i for i, token in enumerate(body.tokens) if token >= size), None)
    if wrong is not None:
        message = f"tokens: must be in 0 .. {size - 1} (the vocabulary)"
        raise ApiError(400, "invalid_value", message, param=f"tokens[{wrong}]")
    decode = partial(house.engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JsonResponse({"prompt": await house.in_thread(len(body.tokens), decode)})


async def tokenizer_info(house: House, request: Request) -> Response:
    """What a client needs to use the server's tokenizer from afar, as in vLLM; lm-eval asks for it."""
    tokenizer, info = house.engine.tokenizer, house.engine.info
    ends = [tokenizer.id_to_text(token) for token in tokenizer.eos_token_ids]
    return JsonResponse(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.special_tokens.get("bos_token"),
            "eos_token": tokenizer.special_tokens.get("eos_token") or next(iter(ends), None),
            "eos_tokens": ends,
            "add_bos_token": tokenizer.add_bos,
            "model_max_length": info.limits.longest,
            "chat_template": tokenizer.chat_template,
        }
    )


async def ready(house: House, request: Request) -> Response:
    """Whether a request sent now would be served. Why not is told to those who may know: without keys, to all."""
    found = house.engine.ready()
    said: dict[str, Any] = {"ready": found.ready}
    if not found.ready and not len(house.keys):
        said["why"] = found.why
    return JsonResponse(said, status_code=200 if found.ready else 503)


async def debug_requests(house: House, request: Request) -> Response:
    """Who waits and why, who runs; no text. With `ready` and why not."""
    found = house.engine.ready()
    gauges = asdict(house.engine.stats().gauges)
    views = []
    for view in await house.engine.requests():
        guest = house.guests.get(view.request_id.partition("/")[0])
        views.append(asdict(view) | {"x_request_id": None if guest is None else guest.request_id})
    return JsonResponse({"ready": found.ready, "why": found.why, "now": gauges, "requests": views})


async def metrics(found: Metrics, request: Request) -> Response:
    return Response(found.text(), media_type=CONTENT_TYPE)
