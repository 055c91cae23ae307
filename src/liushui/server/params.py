"""A body becomes what the engine takes."""

from typing import Any

from liushui.core.request import SamplingParams
from liushui.engine.serving import EngineInfo, ServeRequest
from liushui.server.errors import ApiError
from liushui.server.schema.common import Generation
from liushui.server.visit import Visit

SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)
"""Fields that `SamplingParams` has under the same name, and with the same meaning."""


def sampling_params(body: Generation, info: EngineInfo, *, max_tokens: int | None, **derived: Any) -> SamplingParams:
    """Only what the client gave is given to the engine: everything else has the engine's default.

    `derived`: parameters that the endpoint makes of several fields; None: not given. Raises `ParameterError`.
    """
    given = body.given(*SAME_NAME) | {name: value for name, value in derived.items() if value is not None}
    if body.truncate_prompt_tokens is not None:
        room = info.limits.longest - (max_tokens or 1)
        given["truncate_prompt_tokens"] = (
            max(room, 1) if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
        )
    return SamplingParams(max_tokens=max_tokens, **given)


def serve_request(
    body: Generation, visit: Visit, ids: list[int], params: SamplingParams, request_id: str, **where: Any
) -> ServeRequest:
    """One prompt of a body. `where`: index, prompt. Raises `ApiError` 403 for a priority above the key's."""
    priority = max(0, visit.key.priority) if body.priority is None else body.priority
    if priority < visit.key.priority:
        message = f"priority: this key may ask for {visit.key.priority} and more (lower is served first)"
        raise ApiError(403, "not_permitted", message, param="priority")
    return ServeRequest(
        prompt_token_ids=ids,
        params=params,
        stream=body.streams,
        request_id=request_id,
        priority=priority,
        tenant=visit.key.name,
        cache_salt=body.cache_salt or "",
        timeout=body.timeout,
        **where,
    )
