"""Every field of the API is honoured, ignored by name, or refused by name; the table is walked whole."""

import math
from typing import Any, get_args

import pytest

from liushui.server.errors import ApiError
from liushui.server.params import SAME_NAME
from liushui.server.schema.chat import ChatRequest
from liushui.server.schema.common import Body, StreamOptions
from liushui.server.schema.completions import CompletionRequest
from liushui.server.schema.tokenize import DetokenizeRequest, TokenizeRequest
from tests.support.serving import Running, events

MESSAGES = [{"role": "user", "content": "hi"}]
LEAST: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"messages": MESSAGES},
    CompletionRequest: {"prompt": "hi"},
    TokenizeRequest: {"prompt": "hi"},
    DetokenizeRequest: {"tokens": [1]},
}
PATHS = {
    ChatRequest: "/v1/chat/completions",
    CompletionRequest: "/v1/completions",
    TokenizeRequest: "/tokenize",
    DetokenizeRequest: "/detokenize",
}
GENERATING = (ChatRequest, CompletionRequest)

# Values that must be honoured, and values that must be refused, for every honoured field.
FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["tiny", None], ["", 3, "x" * 1000]),
    "n": ([1, 3, None], [0, -1, 129, 10**9, 10**30, 1.5, True, "2"]),
    "temperature": ([0, 0.7, 2, 100], [-0.1, 101, 1e300, math.nan, math.inf, "1", True, []]),
    "top_p": ([0.1, 1], [0, -1, 1.01, math.nan]),
    "top_k": ([-1, 0, 5, 2**31 - 1], [-2, 2**31, 1.0, "5"]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1, math.inf]),
    "repetition_penalty": ([0.01, 0.5, 1.3], [0, 5e-324, 0.009, -1, 101, math.nan]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 3, "1"]),
    "logit_bias": ([{}, {"3": 5}, {"3": -100}], [{"x": 1}, {"-1": 1}, {"999999": 1}, {"3": 101}, {"3": math.nan}, []]),
    "seed": ([0, -5, 2**63 - 1], [2**63, -(2**63) - 1, 1.5, "1"]),
    "stop": (["x", ["x", "y"], [], None], ["", [""], ["x"] * 65, [1], {}, 3, "x" * 1025]),
    "stop_token_ids": ([[], [1, 2]], [[-1], [10**6], [2**40], ["1"], [1] * 65, 3]),
    "ignore_eos": ([True, False], [1, "true"]),
    "min_tokens": ([0, 1], [-1, 2**31, 1.5, 3]),
    "include_stop_str_in_output": ([True], ["yes"]),
    "skip_special_tokens": ([True, False], [0]),
    "truncate_prompt_tokens": ([-1, 1, 1000], [0, -2, 2**31]),
    "prompt_logprobs": ([0, 20], [-1, 21, 1.0, True]),
    "stream": ([False, None], ["true", 1]),
    "stream_options": ([None], [{"include_usage": True}, {}, [], {"x": 1}]),
    "add_special_tokens": ([True, False], [1]),
    "priority": ([0, 5, -5], [101, -101, 2**63, 0.5, "high"]),
    "request_id": (["abc-1.2:3_4"], ["", "a b", "x" * 129, "a/b", "é", 5, "a\n"]),
    "cache_salt": (["s"], ["", "x" * 1025, 5]),
    "return_token_ids": ([True, False, None], [1]),
    "return_tokens_as_token_ids": ([True], ["x"]),
    "timeout": ([5, 0.5], [0, -1, math.inf, math.nan, 1e9]),
    "return_timings": ([True], [1]),
    "return_params": ([True], [1]),
    "messages": ([MESSAGES], [[], "hi", [{}], [{"role": "user"}], [{"role": "boss", "content": "x"}], [1], None]),
    "max_completion_tokens": ([1, 5], [0, -1, 10**6, 2**40, 1.0]),
    "max_tokens": ([1, 5], [-1, 10**6, 2**40, "5"]),
    "logprobs": ([], [-1, 21, "x", 1.5]),
    "top_logprobs": ([0], [-1, 21, 5]),
    "add_generation_prompt": ([True, False], [1]),
    "chat_template_kwargs": ([{}, None], [{"messages": []}, {"no_such_variable": 1}, [], 3]),
    "prompt": (["a", ["a", "b"], [1, 2], [[1], [2]]], [[], [[]], ["a", 1], [1, "a"], [-1], [10**6], [[1], "a"], 5, {}]),
    "echo": ([True, False], [1]),
    "return_token_strs": ([True], [1]),
    "tokens": ([[], [1, 2]], [[-1], [10**6], ["1"], 5, [1.5], None]),
}
IGNORED = {
    "user": (["me"], [5, "x" * 2000]),
    "metadata": ([{}, {"a": "b"}, None], [[], "x", {str(i): 1 for i in range(65)}]),
    "safety_identifier": (["x"], [1]),
    "prompt_cache_key": (["x"], [1]),
    "session_id": (["x"], [1]),
}


def honoured(body: type[Body]) -> list[str]:
    return [name for name in body.model_fields if name not in body.ignored]


CASES = [(body, name) for body in LEAST for name in body.model_fields]


@pytest.mark.parametrize(("body", "name"), CASES, ids=lambda item: getattr(item, "__name__", item))
def test_every_field(server: Running, body: type[Body], name: str) -> None:
    """Good values are answered, bad ones refused with 400 naming the field, and the server is none the worse."""
    good, bad = (IGNORED if name in body.ignored else FIELDS)[name]
    if body is TokenizeRequest:
        good, bad = {"prompt": (["a", ""], [5, ["a"], {}]), "messages": (good, bad[:-1])}.get(name, (good, bad))
    least = dict(LEAST[body])
    if body in GENERATING:
        least["max_tokens"] = 2
    if name == "max_completion_tokens":
        del least["max_tokens"]
    if body is TokenizeRequest and name in ("messages", "add_generation_prompt", "chat_template_kwargs"):
        least = {"messages": MESSAGES}
    for value in good:
        response = server.post(PATHS[body], least | {name: value})
        assert response.status_code == 200, (name, value, response.text)
    for value in bad:
        response = server.client.post(
            PATHS[body], content=_json(least | {name: value}), headers={"Content-Type": "application/json"}
        )
        error = response.json()["error"]
        assert response.status_code == 400, (name, value, response.text)
        assert name in (error["param"] or ""), (name, value, error)
        assert name in error["message"], (name, value, error)
        assert error["type"] == "invalid_request_error"


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()


REFUSALS = [(body, name) for body in LEAST for name in body.refused]


@pytest.mark.parametrize(("body", "name"), REFUSALS, ids=lambda item: getattr(item, "__name__", item))
def test_every_refused_field(body: type[Body], name: str) -> None:
    """It is refused with its name, the remedy and a code; what asks for nothing passes."""
    remedy, neutral = body.refused[name]
    for value in (*neutral, None):
        body.read(LEAST[body] | {name: value})
    with pytest.raises(ApiError) as caught:
        body.read(LEAST[body] | {name: {"something": ["else"]}})
    assert caught.value.status == 400
    assert caught.value.code == "unsupported_field"
    assert caught.value.param == name
    assert caught.value.message == f"{name} is not supported: {remedy}"
    assert len(remedy) > 10
    assert name not in body.model_fields


def test_a_neutral_value_of_another_kind_is_no_neutral_value() -> None:
    for name, value in (("best_of", True), ("store", 0), ("length_penalty", True)):
        with pytest.raises(ApiError):
            CompletionRequest.read({"prompt": "a", name: value})


@pytest.mark.parametrize("body", LEAST)
def test_what_does_not_exist_is_refused(body: type[Body]) -> None:
    with pytest.raises(ApiError) as caught:
        body.read(LEAST[body] | {"no_such_field": None})
    assert (caught.value.code, caught.value.param) == ("unknown_field", "no_such_field")
    with pytest.raises(ApiError, match="did you mean model"):
        body.read(LEAST[body] | {"modell": "x"})


def test_every_field_of_openai_is_known() -> None:
    """The official client's own list, so that a new field cannot pass unnoticed."""
    chat = pytest.importorskip("openai.types.chat.completion_create_params")
    legacy = pytest.importorskip("openai.types.completion_create_params")
    for body, module in ((ChatRequest, chat), (CompletionRequest, legacy)):
        theirs = set(module.CompletionCreateParamsStreaming.__annotations__)
        theirs |= set(module.CompletionCreateParamsBase.__annotations__)
        assert len(theirs) > 15
        assert theirs <= set(body.model_fields) | set(body.refused)


def test_every_sampling_parameter_is_reachable() -> None:
    from liushui.core.request import SamplingParams

    derived = {"max_tokens", "logprobs", "truncate_prompt_tokens"}
    assert set(SAME_NAME) | derived == set(SamplingParams.names())
    for body in GENERATING:
        assert set(SAME_NAME) <= set(body.model_fields)


def test_every_number_and_list_is_bounded() -> None:
    """No integer without a greatest, no list or text that the body's size alone would bound, but for prompts."""
    by_size = {"prompt", "messages", "tokens", "content", "stop", "tool_calls"}
    for body in LEAST:
        for name, node in body.model_json_schema()["properties"].items():
            for option in node.get("anyOf", [node]):
                kind = option.get("type")
                if kind in ("integer", "number"):
                    assert {"maximum", "exclusiveMaximum"} & set(option), (body, name)
                    assert {"minimum", "exclusiveMinimum"} & set(option), (body, name)
                if kind == "array" and name not in by_size:
                    assert "maxItems" in option, (body, name)
                if kind == "object" and name not in by_size:
                    assert "maxProperties" in option, (body, name)
                if kind == "string" and name not in by_size:
                    assert "maxLength" in option or "pattern" in option, (body, name)


def test_stream_options(server: Running) -> None:
    plain = events(server.chat(stream=True, max_tokens=3).text)
    assert all("usage" not in chunk for chunk in plain)
    counted = events(server.chat(stream=True, max_tokens=3, stream_options={"continuous_usage_stats": True}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in counted]
    assert counts == sorted(counts)  # a slow reader gets several tokens in one chunk
    assert (counts[0], counts[-1]) == (0, 3)
    refused = server.chat(stream=True, stream_options={"include_obfuscation": True}).json()["error"]
    assert refused["param"] == "stream_options.include_obfuscation"
    assert set(StreamOptions.model_fields) == {"include_usage", "continuous_usage_stats", "include_obfuscation"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"seed": 2**63 - 1, "n": 3}, "seed"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ],
)
def test_fields_that_do_not_agree(server: Running, fields: dict[str, Any], param: str) -> None:
    error = server.chat(**fields).json()["error"]
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"stream": True, "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": ["a"] * 100, "n": 11}, "n"),
        ({"prompt": ["a"] * 513}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_completions_that_do_not_agree(server: Running, fields: dict[str, Any], param: str) -> None:
    error = server.post("/v1/completions", {"prompt": "a"} | fields).json()["error"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}]}, "content"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}, "content"),
        ({"role": "user", "content": "a", "name": "bob"}, "name"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": "a", "extra": 1}, "extra"),
        ({"role": "user", "content": "a", "audio": {"id": "1"}}, "audio"),
    ],
)
def test_parts_of_messages_that_would_be_dropped(server: Running, message: dict[str, Any], param: str) -> None:
    error = server.post("/v1/chat/completions", {"messages": [*MESSAGES, message]}).json()["error"]
    assert error["param"].startswith("messages[1]")
    assert param in error["param"] + error["message"]


def test_literal_roles_are_those_of_openai() -> None:
    from liushui.server.schema.chat import Role

    assert set(get_args(Role)) == {"system", "developer", "user", "assistant", "tool", "function"}
