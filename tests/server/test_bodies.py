"""Large bodies: bounded in what they are made of, and read while others are served."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.server import wire
from liushui.server.errors import ApiError
from liushui.server.schema.common import MAX_LISTS, MAX_VALUES
from liushui.server.schema.completions import CompletionRequest
from tests.support.serving import Running, running, scripted

TEXTS = st.text(alphabet='ab,:[{"\\}]\n语', max_size=8)
VALUES = st.recursive(
    st.none() | st.integers(-5, 500) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=40,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted()) as found:
        yield found


def counted(value: Any) -> tuple[int, int, int]:
    """(values but for the first of each list and object, lists and objects, names): what a body is bounded in."""
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = [counted(item) for item in (value.values() if isinstance(value, dict) else value)]
    values, lists, names = (sum(one[i] for one in inner) for i in range(3))
    return values + max(len(value), 1), lists + 1, names + (len(value) if isinstance(value, dict) else 0)


@settings(max_examples=200)
@given(VALUES, st.sampled_from([1, 3, 1 << 16]), st.booleans())
def test_what_a_body_is_made_of_is_counted_exactly(value: Any, together: int, escaped: bool) -> None:
    """With bounds that it just keeps it passes, with any of them one less it does not; texts do not count."""
    body = json.dumps(value, ensure_ascii=escaped).encode()
    values, lists, names = counted(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "INLINE_BYTES", together)
        patch.setattr(wire, "MAX_VALUES", values)
        patch.setattr(wire, "MAX_LISTS", max(lists, names, body.count(b'"')))
        wire.check_values(body)
        if values:
            patch.setattr(wire, "MAX_VALUES", values - 1)
            with pytest.raises(ApiError):
                wire.check_values(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}",
        b'{"prompt": [' + b"[]," * MAX_LISTS + b"[]]}",
        b'{"prompt": "a", "metadata": [' + b"{}," * MAX_LISTS + b"{}]}",
        b'{"prompt": [' + b'"",' * MAX_VALUES + b'""]}',
        b'{"prompt": "a", "metadata": {' + b'"a":1,' * MAX_LISTS + b'"b":1}}',
    ],
    ids=["numbers", "lists", "objects", "texts", "names"],
)
def test_too_many_parts(server: Running, body: bytes) -> None:
    answer = server.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert server.complete(max_tokens=2).status_code == 200


def test_a_long_text_of_anything_is_no_part_of_it(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of program text with more commas and brackets than a body may have."""
    monkeypatch.setattr(wire, "MAX_VALUES", 1000)
    monkeypatch.setattr(wire, "MAX_LISTS", 500)
    text = 'f({"a": [1, 2]}, "\\n")' * 1000
    answer = server.complete(text, max_tokens=2)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = server.complete(text, max_tokens=2, truncate_prompt_tokens=5)
    assert answer.json()["usage"]["prompt_tokens"] == 5


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 3}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3}),
    ("/v1/completions", {"prompt": [5, -6, 7]}),
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": "a", "no_such_field": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
    ("/tokenize", {"prompt": "hello"}),
    ("/detokenize", {"tokens": [5, "a"]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_body_read_on_a_thread_gets_the_same_answer(
    server: Running, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> tuple[int, Any]:
        found = server.post(path, body)
        said = found.json()
        said["usage"] = {"prompt_tokens": said.get("usage", {}).get("prompt_tokens")}  # what is cached may differ
        return found.status_code, {name: said.get(name) for name in ("error", "usage", "tokens", "prompt")}

    here = answer()
    monkeypatch.setattr(wire, "INLINE_BYTES", 0)
    assert answer() == here


def test_others_are_served_while_a_large_body_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    parse = wire.from_json

    def slowly(data: bytes) -> Any:
        if len(data) > wire.INLINE_BYTES:
            begun.set()
            assert go.wait(60)
        return parse(data)

    monkeypatch.setattr(wire, "from_json", slowly)
    found: list[int] = []
    large = threading.Thread(target=lambda: found.append(server.complete("a" * 100_000).status_code))
    large.start()
    assert begun.wait(60)
    assert server.complete(max_tokens=2).status_code == 200
    assert not found
    go.set()
    large.join(60)
    assert found == [400]


def test_token_ids_are_looked_at_in_parts() -> None:
    """The place of a wrong one is that in the whole prompt, and nothing is lost between the parts."""
    ids = list(range(200_000))
    assert CompletionRequest.read({"prompt": ids}).prompt == [ids]
    for place in (0, 65_535, 65_536, 199_999):
        wrong = ids.copy()
        wrong[place] = -1
        with pytest.raises(ApiError, match=rf"prompt: \[{place}\] must be token ids"):
            CompletionRequest.read({"prompt": wrong})
        with pytest.raises(ApiError, match=rf"prompt: \[1\]\[{place}\] must be token ids"):
            CompletionRequest.read({"prompt": [[1], wrong]})


def test_far_too_many_token_ids_are_refused_by_their_number(server: Running) -> None:
    answer = server.complete([5] * 300_000).json()["error"]
    assert (answer["code"], answer["param"]) == ("context_length_exceeded", "prompt")
    assert "300,000 tokens" in answer["message"]


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_a_slash_too_many_is_another_path(server: Running, path: str) -> None:
    """No redirect: it would go wherever the request's Host says."""
    answer = server.client.get(path, headers={"host": "localhost"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
