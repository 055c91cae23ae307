"""Coming and going: disconnects, slow readers, crowds, overload, deadlines, the end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from liushui.config import ServingConfig
from liushui.errors import Overloaded
from tests.cli.conftest import make_model
from tests.engine.scripted import ScriptedExecutor
from tests.support.serving import Running, events, running, scripted


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def nothing_left(server: Running) -> bool:
    """No request, no block."""
    scheduler = server.engine.engine.scheduler
    unfinished = server.engine.stats().gauges.unfinished_requests
    return not unfinished and not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_blocks


def tokens_made(server: Running) -> int:
    """By the model, whether anybody saw them or not."""
    counters = server.engine.stats().counters
    return counters["output_tokens"] + counters["wasted_tokens"]


def unfinished(server: Running) -> int:
    return server.engine.stats().gauges.unfinished_requests


class Gate:
    """Holds the engine's steps, and lets them through one by one."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.steps = 0
        self.single = threading.Semaphore(0)

    def __call__(self, plan: Any) -> None:
        while not self.open.is_set() and not self.single.acquire(timeout=0.01):
            pass
        self.steps += 1

    def let(self, steps: int) -> None:
        """Through with so many steps, and no more."""
        self.open.clear()
        for _ in range(steps):
            self.single.release()

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()


def metrics(server: Running) -> str:
    return "\n".join(line for line in server.client.get("/metrics").text.splitlines() if "/v1/completions" in line)


def raw_post(server: Running, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """Ask without reading. `receive_buffer`: bytes that the system takes in for us."""
    data = json.dumps(body).encode()
    raw = socket.socket()
    if receive_buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return raw


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_request_within_a_step(stream: bool) -> None:
    """Steps are let through one by one: after the client has left, at most the step in flight adds a token."""
    gate = Gate()
    with running(scripted(ScriptedExecutor(model=lambda new, n: 40, on_step=gate))) as server, gate:
        gate.let(3)
        raw = raw_post(server, {"prompt": "abc", "max_tokens": 200, "stream": stream, "ignore_eos": True})
        until(lambda: tokens_made(server) == 3)
        raw.close()
        until(lambda: 'status="499"' in metrics(server))
        gate.let(20)
        until(lambda: nothing_left(server))
        assert tokens_made(server) <= 4
        assert gate.steps <= 4
        gate.open.set()
        assert server.complete("a", max_tokens=2, ignore_eos=True).status_code == 200


def test_a_disconnect_is_in_the_log_and_the_metrics() -> None:
    gate = Gate()
    with running(scripted(ScriptedExecutor(model=lambda new, n: 40, on_step=gate))) as server, gate:
        for number, stream in enumerate((False, True), 1):
            gate.let(2)
            before = tokens_made(server)
            raw = raw_post(server, {"prompt": "a", "max_tokens": 200, "stream": stream, "ignore_eos": True})
            until(lambda before=before: tokens_made(server) == before + 2)
            raw.close()
            until(lambda number=number: f'status="499"}} {number}.0' in metrics(server))
            gate.open.set()
            until(lambda: nothing_left(server))
        assert 'liushui_http_requests_total{path="/v1/completions",status="499"} 2.0' in metrics(server)


def test_many_disconnects_leave_nothing_behind(server: Running) -> None:
    reference = server.complete("the fox", max_tokens=8, seed=1, logprobs=2).json()["choices"]

    async def vandal(number: int) -> None:
        body = {
            "prompt": f"{number} the quick brown fox",
            "max_tokens": 80,
            "stream": number % 2 == 0,
            "n": 1 + number % 3,
        }
        async with httpx.AsyncClient(base_url=server.url) as client:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01 * (number % 7) + 0.005):
                    await client.post("/v1/completions", json=body)

    async def all_of_them() -> None:
        await asyncio.gather(*(vandal(number) for number in range(60)))

    asyncio.run(all_of_them())
    until(lambda: nothing_left(server))
    server.engine.engine.scheduler.check()
    assert server.complete("the fox", max_tokens=8, seed=1, logprobs=2).json()["choices"] == reference


def test_a_crowd_gets_what_each_would_get_alone(server: Running) -> None:
    """Forty at once, of all kinds: byte for byte the answers of one at a time."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{i} the {'quick ' * (i % 5)}fox", "max_tokens": 3 + i % 9, "seed": i, "temperature": (i % 3) / 2}
        | [{"logprobs": 2}, {"n": 2}, {"stop": ["a"]}, {"echo": True}, {"top_k": 5}][i % 5]
        for i in range(40)
    ]
    alone = [server.post("/v1/completions", body).json()["choices"] for body in bodies]

    async def together() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"] for answer in answers]

    assert asyncio.run(together()) == alone
    until(lambda: nothing_left(server))


def test_overload() -> None:
    """Refused at once, with when to come back; nothing is left of a list of which one was refused."""
    engine = scripted()
    accept, budget = engine.submit, [0]

    async def submit(request: Any) -> Any:
        if budget[0] == 0:
            raise Overloaded("queue_requests", "256 requests wait already", 2.3)
        budget[0] -= 1
        return await accept(request)

    engine.submit = submit  # type: ignore[method-assign]
    with running(engine) as server:
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "3"
            assert response.json()["error"]["code"] == "queue_requests"
            assert response.json()["error"]["type"] == "overloaded_error"
        budget[0] = 2
        assert server.complete(["a", "b", "c"], max_tokens=5).status_code == 503
        until(lambda: nothing_left(server))


def test_an_engine_that_is_not_ready() -> None:
    from liushui.engine.serving import Readiness

    engine = scripted()
    with running(engine) as server:
        engine.ready = lambda: Readiness(False, "no step for 60 s")  # type: ignore[method-assign]
        response = server.client.get("/ready")
        assert (response.status_code, response.json()) == (503, {"ready": False, "why": "no step for 60 s"})
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_dies(stream: bool) -> None:
    """Before the first token a status, behind it an event; never a hang, never a made-up end."""
    for tokens in (0, 3):
        fail = {tokens: "died"}
        executor = ScriptedExecutor(
            fail_row=lambda new, n, fail=fail: fail.get(n), on_step=lambda plan: time.sleep(0.02)
        )
        with running(scripted(executor)) as server:
            response = server.complete("a", max_tokens=9, stream=stream, ignore_eos=True)
            if stream and tokens:
                assert response.status_code == 200
                found = events(response.text)
                assert found[-1]["error"]["code"] == "model_error"
                assert all(not chunk["choices"][0]["finish_reason"] for chunk in found[:-1])
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (500, "model_error")
            assert "died" not in response.text


def test_a_full_queue_refuses_before_it_tokenizes() -> None:
    """What is refused costs nothing: the text is not looked at."""
    gate = Gate()
    executor = ScriptedExecutor(model=lambda new, n: 40, on_step=gate)
    with running(scripted(executor, serving=ServingConfig(max_queue_requests=2), max_num_seqs=1)) as server, gate:
        gate.let(0)
        threads = [threading.Thread(target=server.complete, args=("a",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: unfinished(server) == 3)  # the one with the seat, as far as the server knows, waits too
        encode, texts = server.engine.tokenizer.encode, []
        server.engine.tokenizer.encode = lambda text, *rest: texts.append(text) or encode(text, *rest)
        try:
            for _ in range(5):
                response = server.complete("x " * 10_000)
                assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_requests")
                assert int(response.headers["retry-after"]) >= 1
            assert texts == []
            for path in ("completions", "chat/completions"):  # nor is the body waited for
                head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 60) as raw:
                    raw.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
                    assert raw.recv(1000).startswith(b"HTTP/1.1 503 ")
        finally:
            del server.engine.tokenizer.encode
        assert 'liushui_requests_refused_total{reason="queue_requests"}' in server.client.get("/metrics").text
        gate.open.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_is_told(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part of the answer, its finish reason says so; with nothing of it, the status."""
    monkeypatch.setattr("liushui.engine.async_engine._GRACE", 0.1)
    gate = Gate()
    with running(scripted(ScriptedExecutor(model=lambda new, n: 40, on_step=gate), max_num_seqs=1)) as server, gate:
        gate.let(3)  # its time is over before the fourth
        fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "stream": stream}
        some = server.complete("a", timeout=2.0, **fields)
        assert some.status_code == 200
        choices = events(some.text)[-1]["choices"] if stream else some.json()["choices"]
        assert choices[0]["finish_reason"] == "timeout"
        first = threading.Thread(target=lambda: server.complete("a", request_id="first", **fields))
        first.start()
        until(lambda: unfinished(server) == 1)
        none = server.complete("b", timeout=0.1, **fields)  # it never gets the only seat
        assert (none.status_code, none.json()["error"]["code"]) == (504, "timeout")
        (view,) = server.call(server.engine.requests())
        server.call(server.engine.abort(view.request_id))
        gate.open.set()
        first.join(60)
        until(lambda: nothing_left(server))


def test_cancelled_from_elsewhere() -> None:
    gate = Gate()
    with running(scripted(ScriptedExecutor(model=lambda new, n: 40, on_step=gate))) as server, gate:
        gate.let(3)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(server.complete("a", max_tokens=200, ignore_eos=True)))
        waiting.start()
        until(lambda: unfinished(server) == 1)
        assert server.call(server.engine.abort(server.call(server.engine.requests())[0].request_id))
        gate.open.set()
        waiting.join(60)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (500, "aborted")


def test_the_end_waits_for_answers_under_way() -> None:
    """What runs is finished, what is new is refused with 503, and then it is over."""
    gate = Gate()
    with running(scripted(ScriptedExecutor(model=lambda new, n: 40, on_step=gate))) as server, gate:
        gate.let(0)
        answers: list[Any] = []
        fields: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "stream": True}
        waiting = threading.Thread(target=lambda: answers.append(server.complete("a", **fields)))
        waiting.start()
        until(lambda: unfinished(server) == 1)
        server.stop()
        until(lambda: not server.engine.ready().ready)
        refused = server.complete("b")
        assert refused.status_code == 503
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        gate.open.set()
        waiting.join(60)
        choices = [chunk["choices"][0] for chunk in events(answers[0].text)]
        assert len("".join(choice["text"] for choice in choices)) == 20
        assert choices[-1]["finish_reason"] == "length"


def serve_command(model: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "liushui.cli.main", "serve", str(model), "--port", "0", "--threads", "1", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("listening on "):
            return line.split()[2]
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_from_start_to_end(tmp_path: Path, number: int) -> None:
    """A folder becomes an answer, and a signal an end."""
    model = make_model(tmp_path / "model")
    with serve_command(model, "--served-model-name", "mine", "--kv-cache-gib", "0.01") as process:
        url = address_of(process)
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={"model": "mine", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
            timeout=60,
        )
        assert answer.json()["usage"]["completion_tokens"] <= 3
        process.send_signal(number)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "stopped" in process.stderr.read()


def children(pid: int) -> list[int]:
    """Processes that this one started (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_engine_is_killed_under_load(tmp_path: Path) -> None:
    """Who has seen a part gets an error, who has seen nothing an answer, and the server goes on."""
    model = make_model(tmp_path / "model")
    with serve_command(model, "--kv-cache-gib", "0.01", "--served-model-name", "m") as process:
        url = address_of(process)
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "seed": 1}
        whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        answers: list[Any] = []
        waiting = [
            threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60)))
            for _ in range(3)
        ]
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for thread in waiting:
                thread.start()
            (engine,) = children(process.pid)
            os.kill(engine, signal.SIGKILL)
            found = [line for line in lines if line]
        assert "engine_died" in found[-2] or '"finish_reason":"length"' in found[-2]  # it may just have been done
        assert found[-1] == "data: [DONE]"
        for thread in waiting:
            thread.join(60)
        assert [(answer.status_code, answer.json().get("choices")) for answer in answers] == [(200, whole)] * 3
        until(lambda: httpx.get(f"{url}/ready", timeout=60).json() == {"ready": True})
        assert "liushui_engine_restarts_total 1.0" in httpx.get(f"{url}/metrics", timeout=60).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with serve_command(model, "--kv-cache-gib", "0.01") as process:
        url = address_of(process)
        body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 60}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            for line in process.stderr:
                if "draining" in line:
                    break
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),  # noqa: S104
        (["--port", "99999"], "--port"),
        (["--api-key", "short"], "8 to"),
        (["--api-key-file", "/nothing/here"], "cannot be read"),
        (["--metrics-compat", "x"], "x"),
        (["--max-body-mib", "-1"], "--max-body-mib"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, flags: list[str], what: str) -> None:
    with serve_command(tmp_path, *flags) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert what in errors
    assert "Traceback" not in errors


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        serve_command(model, "--port", str(taken.getsockname()[1])) as process,
    ):
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot listen" in errors
