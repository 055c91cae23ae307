"""Readers that are slow, or do not read at all: nobody else notices, and what is kept for them is given up."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic_core import to_json

from liushui.engine.ticket import MOST
from liushui.server.pieces import PIECE, Rows, parts, pieces
from liushui.server.visit import Visit
from liushui.server.wire import JsonAnswer
from tests.engine.scripted import ScriptedExecutor
from tests.server.test_life import metrics, nothing_left, raw_post, tokens_made, unfinished, until
from tests.support.serving import Running, events, running, scripted, tiny_engine

FOREVER = 90_000
HUGE: dict[str, Any] = {"prompt": "a", "max_tokens": FOREVER, "stream": True, "ignore_eos": True, "logprobs": 20}


def endless(enough: int = 20_000) -> tuple[ScriptedExecutor, threading.Event]:
    """A model that stops after so many steps until the event is set: no answer of `FOREVER` tokens ends before."""
    steps, released = 0, threading.Event()

    def pause(plan: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > enough:
            released.wait(120)

    return ScriptedExecutor(model=lambda new, n: 40 + n % 7, on_step=pause), released


def deaf(server: Running, body: dict[str, Any]) -> socket.socket:
    """Asks, and reads nothing."""
    return raw_post(server, body, receive_buffer=1024)


def test_a_slow_reader_holds_up_nobody() -> None:
    """One client reads nothing of a long stream; others are answered, and its blocks are free when its answer ends."""
    with running(tiny_engine(max_model_len=128)) as server:
        slow = raw_post(
            server, {"prompt": "a", "max_tokens": 100, "n": 4, "stream": True, "ignore_eos": True, "logprobs": 20}
        )
        for _ in range(3):
            assert server.complete("the fox", max_tokens=4).status_code == 200
        until(lambda: nothing_left(server))
        received = b""
        slow.settimeout(60)
        while b"[DONE]" not in received:
            received += slow.recv(65536)
        slow.close()
        assert received.count(b'"finish_reason":"length"') == 4


def test_a_reader_that_never_reads_is_given_up() -> None:
    """While tokens and their log-probabilities pile up: its answer is ended long before it would be done."""
    executor, released = endless()
    with running(scripted(executor, max_model_len=100_000, num_blocks=30_000), write_timeout=0.3) as server:
        raw = deaf(server, HUGE)
        until(lambda: 'status="499"' in metrics(server))
        released.set()
        until(lambda: nothing_left(server))
        assert tokens_made(server) < FOREVER
        raw.close()


def test_beside_a_reader_that_never_reads_streams_flow() -> None:
    """It sits there all the time; another client's stream comes token by token, and the server says that it lives."""
    executor, released = endless(5_000)
    with running(scripted(executor, max_model_len=100_000, num_blocks=30_000), write_timeout=600) as server:
        raw = deaf(server, HUGE)
        until(lambda: tokens_made(server) > 3_000)
        released.set()
        for _ in range(3):
            body = {"prompt": "b", "max_tokens": 40, "stream": True, "ignore_eos": True, "logprobs": 2}
            with server.client.stream("POST", "/v1/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                first = [next(lines) for _ in range(1)]
                assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
                text = "\n\n".join([*first, *lines])
            assert len([token for chunk in events(text) for token in chunk["choices"][0]["logprobs"]["tokens"]]) == 40
        assert unfinished(server) == 1  # it is still there
        raw.close()
        until(lambda: nothing_left(server))
        assert tokens_made(server) < FOREVER + 120


@pytest.fixture(scope="module")
def long() -> Iterator[Running]:
    """Answers of thousands of tokens."""
    executor = ScriptedExecutor(model=lambda new, n: 40 + n % 7)
    with running(scripted(executor, max_model_len=4_000, num_blocks=4_000)) as found:
        yield found


def whole_of(found: list[Any], index: int) -> list[Any]:
    return [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]


def test_a_late_reader_of_a_huge_stream(long: Running) -> None:
    """It wakes up when thousands of tokens lie ready: it gets them in pieces, and they are the answer."""
    body = {"prompt": "a", "max_tokens": 1_500, "n": 2, "ignore_eos": True, "logprobs": 20, "seed": 1}
    right = long.post("/v1/completions", body)
    raw = deaf(long, body | {"stream": True, "stream_options": {"include_usage": True}})
    until(lambda: unfinished(long) == 1)
    until(lambda: unfinished(long) == 0)
    assert long.client.get("/health").status_code == 200
    raw.settimeout(60)
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += raw.recv(1 << 20)
    raw.close()
    text = unchunked(received.partition(b"\r\n\r\n")[2]).decode()
    found = events(text)
    assert found[-1]["usage"] == right.json()["usage"]
    for choice in right.json()["choices"]:
        mine = whole_of(found, choice["index"])
        assert 1_500 // 4 > len(mine) > 1_500 * 21 // MOST / 10  # before its buffers are full it gets small ones
        assert all(len(piece["logprobs"]["tokens"]) <= MOST // 21 for piece in mine)
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["length"]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in mine for value in piece["logprobs"][name]] == values


def unchunked(data: bytes) -> bytes:
    """The body of a chunked answer (RFC 9112, 7.1)."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return body


def test_a_huge_answer_is_the_stream_in_one(long: Running) -> None:
    """Chat's shape, and both ways of asking for the prompt's; no length is said of what is written as it is made."""
    body = {"max_tokens": 500, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, "seed": 1}
    whole = long.chat("hello " * 100, **body, prompt_logprobs=20)
    assert whole.headers["transfer-encoding"] == "chunked"
    assert whole.headers["content-type"] == "application/json"
    streamed = events(long.chat("hello " * 100, **body, stream=True).text)
    deltas = [choice for choice in whole_of(streamed, 0) if choice["logprobs"]]
    answer = whole.json()
    assert [entry for one in deltas for entry in one["logprobs"]["content"]] == answer["choices"][0]["logprobs"][
        "content"
    ]
    assert "".join(one["delta"].get("content", "") for one in deltas) == answer["choices"][0]["message"]["content"]
    prompt = answer["prompt_logprobs"]
    assert (prompt[0], len(prompt)) == (None, answer["usage"]["prompt_tokens"])
    assert all(len(entry) in (20, 21) for entry in prompt[1:])
    short = long.complete("a", max_tokens=3, logprobs=2)
    assert int(short.headers["content-length"]) == len(short.content)


def test_a_reader_of_one_huge_answer_may_leave(long: Running) -> None:
    raw = deaf(long, {"prompt": "a", "max_tokens": 3_000, "ignore_eos": True, "logprobs": 20, "n": 2})
    raw.settimeout(60)
    before = metrics(long).count('status="499"')
    assert raw.recv(100).startswith(b"HTTP/1.1 200 OK")  # it is being written
    raw.close()
    until(lambda: metrics(long).count('status="499"') > before)
    until(lambda: nothing_left(long))


# -- the pieces


def test_pieces_of_json_are_the_json() -> None:
    def value(rows: Any) -> dict[str, Any]:
        choice = {"text": "é" * 9000, "logprobs": {"tokens": rows(["a"], [], ["b", "c"]), "none": rows(), "x": []}}
        return {
            "id": "1",
            "choices": [choice, {}, {"logprobs": None}],
            "usage": {"n": 1.5},
            "empty": {},
            "list": [1, [2]],
        }

    made = list(pieces(value(lambda *parts: Rows(parts))))
    assert b"".join(made) == to_json(value(lambda *parts: [item for part in parts for item in part]))
    assert len(made) == 2
    assert len(made[0]) >= PIECE
    assert [list(range(100))[part] for part in parts(100, 20)] == [list(range(48)), [*range(48, 96)], [*range(96, 100)]]


def test_a_huge_answer_is_written_in_turns() -> None:
    """Between two pieces everybody else has a turn, also where the network takes all at once."""
    turns, sent = 0, []

    async def work() -> None:
        nonlocal turns

        async def send(message: Any) -> None:
            sent.append((turns, message))

        async def receive() -> Any:
            await asyncio.sleep(1000)

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        visit = Visit("1", "POST", "/", None, time.monotonic(), 1, 1.0, 60.0)  # type: ignore[arg-type]
        answer = JsonAnswer({"rows": Rows([["x" * PIECE]] * 20)}, visit)
        beside = asyncio.create_task(other())
        await answer({}, receive, send)
        beside.cancel()

    asyncio.run(work())
    bodies = [message["body"] for _, message in sent[1:]]
    assert json.loads(b"".join(bodies)) == {"rows": ["x" * PIECE] * 20}
    assert len({turn for turn, _ in sent[1:]}) == len(bodies) >= 20
    assert [message.get("more_body") for _, message in sent[1:]] == [True] * (len(bodies) - 1) + [False]
