"""What clients that are not installed here send: Open WebUI and GuideLLM (recorded at 0.8.1), an older lm-eval."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.serving import Running, events, running, scripted

HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """What it says does not matter here."""
    with running(scripted()) as found:
        yield found


def guidellm_lines(text: str) -> tuple[str, dict[str, Any] | None]:
    """(text, usage) as GuideLLM reads a stream: line by line, the last usage that is not empty."""
    said, usage = [], None
    for line in text.split("\n"):
        if line == "data: [DONE]":
            return "".join(said), usage
        if not line.startswith("data:"):
            continue
        data = json.loads(line[5:].strip())
        choice = (data.get("choices", []) or [{}])[0]
        said.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        usage = data.get("usage", {}) or usage
    raise AssertionError("no [DONE]")


@pytest.mark.parametrize("both", [False, True])
def test_guidellm_completions(server: Running, both: bool) -> None:
    """Exactly so many tokens are asked for; older versions send both names of their number."""
    assert server.client.get("/health").raise_for_status()
    model = server.client.get("/v1/models").json()["data"][0]["id"]
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 7,
        **({"max_completion_tokens": 7, "stop": None} if both else {}),
        "ignore_eos": True,
        "prompt": "the quick fox",
    }
    text, usage = guidellm_lines(server.post("/v1/completions", body).text)
    assert text
    assert usage is not None
    assert (usage["completion_tokens"], usage["total_tokens"]) == (7, usage["prompt_tokens"] + 7)


def test_guidellm_chat(server: Running) -> None:
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 5,
        "stop": None,
        "ignore_eos": True,
        "messages": [
            {"role": "system", "content": "prefix"},
            {"role": "user", "content": [{"type": "text", "text": "the quick"}, {"type": "text", "text": " fox"}]},
        ],
    }
    text, usage = guidellm_lines(server.post("/v1/chat/completions", body).text)
    assert text
    assert usage is not None
    assert usage["completion_tokens"] == 5


def test_open_webui(server: Running) -> None:
    """The list of models, a chat with its settings, and the title that it asks for behind the user's back."""
    headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "J%C3%BCrgen", "Accept": "*/*"}
    found = server.client.get("/v1/models", headers=headers).json()
    assert found["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= set(found["data"][0])
    body = {
        "stream": True,
        "model": found["data"][0]["id"],
        "messages": [{"role": "system", "content": "be kind"}, HELLO],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "seed": 0,
        "stop": ["\n\n\n"],
        "max_tokens": 8,
        "logit_bias": {"5": -100},
        "tool_choice": None,
        "tools": None,
    }
    chunks = events(server.post("/v1/chat/completions", body, headers=headers).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] <= 8
    title = {"model": "tiny", "messages": [HELLO], "stream": False, "max_completion_tokens": 9}
    answer = server.post("/v1/chat/completions", title).json()
    assert isinstance(answer["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"chat": "1"}, "store": False, "parallel_tool_calls": False},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "functions": []},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "store": None},
        {"service_tier": "auto", "modalities": ["text"], "reasoning_effort": None, "audio": None},
        {"n": 1, "logit_bias": {}, "stop": [], "stream_options": None, "logprobs": False, "top_logprobs": None},
    ],
)
def test_fields_that_ask_for_nothing(server: Running, fields: dict[str, Any]) -> None:
    assert server.chat(max_tokens=2, **fields).status_code == 200


def test_lm_eval_chat(server: Running) -> None:
    """local-chat-completions, the versions that write a type into every message."""
    body = {
        "messages": [{"role": "system", "content": "be kind", "type": "text"}, HELLO | {"type": "text"}],
        "model": "tiny",
        "max_tokens": 5,
        "temperature": 0,
        "stop": ["\n\n"],
        "seed": 1234,
    }
    answer = server.post("/v1/chat/completions", body).json()
    same = server.post("/v1/chat/completions", body | {"messages": [{"role": "system", "content": "be kind"}, HELLO]})
    assert answer["choices"] == same.json()["choices"]
    assert answer["choices"][0]["message"]["content"]
    wrong = server.post("/v1/chat/completions", body | {"messages": [HELLO | {"type": "image"}]}).json()["error"]
    assert wrong["param"] == "messages[0].type"


def test_an_answer_goes_back_as_it_came(server: Running) -> None:
    """Clients put the whole message of an answer into the next request."""
    message = server.chat(max_tokens=3).json()["choices"][0]["message"]
    more = {"tool_calls": [], "function_call": None, "audio": None, "annotations": []}
    body = {"messages": [HELLO, message | more, HELLO], "max_tokens": 2}
    assert server.post("/v1/chat/completions", body).status_code == 200
