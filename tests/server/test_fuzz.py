"""Nonsense in: the pass mark is that a reference request is answered byte for byte as before, and nothing is left."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liushui.server.schema.chat import ChatRequest
from liushui.server.schema.completions import CompletionRequest
from liushui.server.schema.tokenize import DetokenizeRequest, TokenizeRequest
from tests.server.test_life import nothing_left, until
from tests.server.test_schema import FIELDS, IGNORED, LEAST, PATHS
from tests.support.serving import Running, running, tiny_engine

EXAMPLES = 60
BODIES = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]
ALLOWED = {200, 400, 404, 413}


class Reference:
    """A request whose answer must never change."""

    BODY: dict[str, Any] = {"prompt": ["the quick fox", "你"], "max_tokens": 6, "seed": 3, "n": 2, "logprobs": 3}  # noqa: RUF012

    def __init__(self, server: Running) -> None:
        self.server = server
        self._first = self._ask()

    def _ask(self) -> str:
        answer = self.server.post("/v1/completions", self.BODY).json()
        return json.dumps({"choices": answer["choices"], "fingerprint": answer["system_fingerprint"]})

    def check(self) -> None:
        until(lambda: nothing_left(self.server))
        assert self._ask() == self._first
        self.server.engine.engine.scheduler.check()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Running]:
    with running(tiny_engine(max_model_len=64)) as server:
        reference = Reference(server)
        yield server
        reference.check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A body that is nearly right: some fields of the table, good or bad, some with any JSON at all."""
    cls = draw(st.sampled_from(BODIES))
    body: dict[str, Any] = dict(LEAST[cls])
    names = [*cls.model_fields, *cls.refused, "unknown"]
    for name in draw(st.lists(st.sampled_from(names), max_size=5, unique=True)):
        good, bad = (FIELDS | IGNORED).get(name, ([], []))
        table = st.sampled_from([*good, *bad]) if good or bad else st.nothing()
        body[name] = draw(table | json_values)
    if cls in (ChatRequest, CompletionRequest) and "max_tokens" not in body:
        body["max_tokens"] = draw(st.integers(1, 4))
    return PATHS[cls], body


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies())
def test_bodies_that_are_nearly_right(fuzzed: Running, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    response = fuzzed.client.post(path, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code in ALLOWED, (response.status_code, response.text, body)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 4000


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(list(PATHS.values())), st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode())
)
def test_bodies_that_are_anything(fuzzed: Running, path: str, body: bytes) -> None:
    response = fuzzed.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in ALLOWED
    assert response.status_code == 200 or response.json()["error"]["type"]


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_http(fuzzed: Running, data: bytes, headed: bool) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" if headed else b""
    with socket.create_connection(("127.0.0.1", int(fuzzed.url.rpartition(":")[2]))) as raw:
        raw.sendall(head + data)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(60)
        answer = raw.recv(4096)
    assert b"Traceback" not in answer
    assert not answer or answer.startswith(b"HTTP/1.1 ")


@settings(max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
            optional={
                "content": st.text(max_size=30)
                | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}), max_size=3),
                "name": st.text(max_size=5),
                "tool_calls": st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=2), max_size=2),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
def test_conversations_of_any_kind(fuzzed: Running, messages: list[dict[str, Any]]) -> None:
    body = json.dumps({"messages": messages, "max_tokens": 2}).encode()
    headers = {"Content-Type": "application/json"}
    response = fuzzed.client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code in ALLOWED, response.text


def test_what_costs_much_is_bounded(fuzzed: Running) -> None:
    """The most of everything that the schema lets through: refused or answered, and the house stands."""
    bias = {str(i): 1.0 for i in range(300)}
    cases: list[dict[str, Any]] = [
        {"prompt": ["a"] * 512, "max_tokens": 1},
        {"prompt": "a", "n": 128, "max_tokens": 1, "logprobs": 20, "prompt_logprobs": 20},
        {"prompt": "a " * 200_000},
        {"prompt": [1] * 1_000_000},
        {"prompt": "a", "logit_bias": bias, "max_tokens": 4},
        {"prompt": "a", "stop": [f"{i}" * 1024 for i in range(64)], "max_tokens": 4},
        {"prompt": "a", "chat_template_kwargs": {}},
        {"prompt": "a", "max_tokens": 10**9},
    ]
    for body in cases:
        response = fuzzed.post("/v1/completions", body, timeout=60)
        assert response.status_code in ALLOWED | {503}, (response.text[:300], str(body)[:100])
    until(lambda: nothing_left(fuzzed))


def test_a_template_bomb_is_a_refusal() -> None:
    """A template that loops over what a client sends costs a bounded time, and the client gets a 400."""
    from liushui.config import EngineConfig
    from liushui.engine.inprocess import InProcessEngine
    from tests.engine.scripted import make_engine, tiny_tokenizer

    template = "{% for i in range(messages[0].content | int) %}{% for j in range(1000) %}x{% endfor %}{% endfor %}"
    bomb = tiny_tokenizer(template=template)
    engine = InProcessEngine.around(make_engine(max_model_len=64), bomb, EngineConfig(model="tiny"))
    with running(engine) as server:
        response = server.chat("999999999")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "chat_template_failed")
        assert "range" not in response.text
        assert server.chat("1", max_tokens=1).status_code in (200, 400)


def test_schemathesis(fuzzed: Running) -> None:
    """Cases made from the server's own OpenAPI document, right ones and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(PATHS.values())
    modes = schemathesis.GenerationMode
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE):

            @settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                if isinstance(case.body, dict) and "n" in case.body:
                    case.body.pop("n")  # many long answers would only take time
                own_time = isinstance(case.body, dict) and case.body.get("timeout") is not None
                response = case.call(timeout=60)
                allowed = ALLOWED | {405, 415} | ({504} if own_time else set())
                assert response.status_code in allowed, (response.status_code, response.text[:500])

            ask()
