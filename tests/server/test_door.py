"""Who gets in: keys, quotas, hosts, sizes; and what every answer carries."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from liushui.errors import ParameterError
from liushui.server.app import build_app
from liushui.server.door import ADMIN, OPEN
from liushui.server.errors import ApiError
from liushui.server.keys import Bucket, Key, KeyRing, Quota
from liushui.server.settings import ServerConfig, is_loopback
from tests.engine.scripted import ScriptedExecutor, saying
from tests.support.serving import Running, running, scripted

FILE = f"""
[keys.alice]
key = "alice-has-this"
max_requests = 2
admin = true

[keys.bob]
sha256 = "{sha256(b"bob-has-that").hexdigest()}"
requests_per_minute = 3
priority = 2

[keys.carol]
key = "carol-has-it-too"
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(FILE)
    with running(scripted(ScriptedExecutor(model=saying("yes"))), api_key_file=str(path)) as server:
        yield server


def routes() -> list[Any]:
    app: Any = build_app(scripted(), ServerConfig(api_key=("some-long-key",)))._app
    return list(app.routes)


def test_every_route_is_closed_without_a_key(keyed: Running) -> None:
    """All routes of the application, and paths that have none."""
    paths = [route.path.replace("{name:path}", "tiny") for route in routes()]
    assert len(paths) >= 10
    assert set(paths) > OPEN
    for path in [*paths, "/", "/docs", "/redoc", "/v1/../v1/models", "//v1/models", "/health/", "/v1/models/"]:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
            for headers in ({}, bearer("wrong-key"), {"Authorization": "Bearer"}, {"Authorization": "alice-has-this"}):
                response = keyed.client.request(method, path, headers=headers)
                if path in OPEN:
                    assert response.status_code in (200, 405), (method, path)
                else:
                    assert response.status_code == 401, (method, path, headers)
                    assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"


def test_every_route_is_open_with_a_key(keyed: Running) -> None:
    for path in ("/v1/models", "/metrics", "/debug/requests", "/openapi.json"):
        assert keyed.client.get(path, headers=bearer("alice-has-this")).status_code == 200
    assert keyed.post("/v1/completions", {"prompt": "a"}, headers=bearer("bob-has-that")).status_code == 200


def test_what_only_an_administrator_may_see(keyed: Running) -> None:
    listed = {route.path for route in routes()}
    guarded = {path for path in listed if path.startswith(ADMIN)}
    assert {"/metrics", "/debug/requests", "/openapi.json"} <= guarded
    for path in guarded:
        response = keyed.client.get(path, headers=bearer("bob-has-that"))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "not_permitted")


def test_priority_is_limited_by_the_key(keyed: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = keyed.post(path, body | {"priority": -1}, headers=bearer("alice-has-this"))
        assert (error.status_code, error.json()["error"]["param"]) == (403, "priority")
        assert keyed.post(path, body | {"priority": 1}, headers=bearer("alice-has-this")).status_code == 200


def test_keys_share_no_prefix_cache(keyed: Running) -> None:
    """What one has asked, another cannot tell from the tokens found in the cache (nor from the time they save)."""
    body = {"prompt": "a secret that only one of them has sent, long enough for blocks", "max_tokens": 1}

    def cached(key: str) -> int:
        usage = keyed.post("/v1/completions", body, headers=bearer(key)).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("alice-has-this") == 0
    assert cached("alice-has-this") > 0
    assert cached("carol-has-it-too") == 0


def test_quota_of_requests() -> None:
    key = Key("k", requests_per_minute=2)
    now = [0.0]
    quota = Quota(key, lambda: now[0])
    quota.enter()
    quota.enter()
    with pytest.raises(ApiError) as caught:
        quota.enter()
    assert caught.value.status == 429
    assert int(caught.value.headers["retry-after"]) == 30
    now[0] = 29.0
    with pytest.raises(ApiError):  # a part of a request is none
        quota.enter()
    now[0] = 30.0
    quota.enter()


def test_quota_of_tokens_and_of_unfinished() -> None:
    now = [0.0]
    quota = Quota(Key("k", max_requests=1, tokens_per_minute=60), lambda: now[0])
    quota.enter()
    with pytest.raises(ApiError, match="max_requests"):
        quota.enter()
    quota.leave(100)
    with pytest.raises(ApiError, match="tokens_per_minute") as caught:
        quota.enter()
    assert int(caught.value.headers["retry-after"]) == 41  # 40 too many, at one a second
    now[0] = 41.0
    quota.enter()


def test_a_quota_is_given_back_whatever_happens(keyed: Running) -> None:
    """Errors, refusals and streams alike: alice may have two unfinished requests, again and again."""
    for i in range(12):
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        body |= [
            {},
            {"stream": True},
            {"temperature": -1},
            {"max_tokens": 100_000},
            {"n": 3},
            {"stream": True, "n": 2},
        ][i % 6]
        response = keyed.post("/v1/completions", body, headers=bearer("alice-has-this"))
        assert response.status_code == (400 if i % 6 in (2, 3) else 200), response.text


def test_a_quota_that_is_used_up_costs_no_reading() -> None:
    """Before the body is looked at: nonsense gets the same 429."""
    keys = KeyRing([(sha256(b"dave-has-this").digest(), Key("dave", requests_per_minute=1))])
    with running(scripted(), keys) as server:
        assert server.complete(max_tokens=2, temperature=-1).status_code == 401
        headers = bearer("dave-has-this")
        statuses = [
            server.post("/v1/completions", {"prompt": "a", "max_tokens": 2} | more, headers=headers).status_code
            for more in ({"temperature": -1}, {}, {"temperature": -1}, {})
        ]
    assert statuses == [400, 200, 429, 429]


def test_bucket_never_holds_more_than_a_minute() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    now[0] = 1e6
    bucket.take(60)
    assert bucket.wait() > 0


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "tables"),
        ("x = 1", "tables"),
        ("[keys.a]\nkey = 'short'", "8 to"),
        ("[keys.a]\nname = 'x'", "key or sha256"),
        ("[keys.a]\nkey = 'long-enough'\nsha256 = 'x'", "key or sha256"),
        ("[keys.a]\nsha256 = 'xyz'", "hexadecimal"),
        ("[keys.a]\nkey = 'long-enough'\nmax_requets = 1", "max_requets"),
        ("[keys.a]\nkey = 'long-enough'\nmax_requests = 0", "max_requests"),
        ("[keys.a]\nkey = 'long-enough'\nadmin = 1", "admin"),
        ("[keys.'a b']\nkey = 'long-enough'", "name"),
        ("[keys.a]\nkey = 'long-enough'\n[keys.b]\nkey = 'long-enough'", "twice"),
        ("[keys", "cannot be read"),
    ],
)
def test_key_files_that_are_wrong(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ParameterError, match=what) as caught:
        KeyRing.load(ServerConfig(api_key_file=str(path)))
    assert caught.value.field == "api_key_file"
    assert "long-enough" not in str(caught.value)


def test_keys_are_not_kept_in_the_clear() -> None:
    ring = KeyRing.load(ServerConfig(api_key=("my-secret-key", "my-other-key")))
    assert "secret" not in repr(vars(ring))
    assert ring.find("my-secret-key") == Key("key-1", priority=-100, admin=True)
    assert ring.find("my-other-key").name == "key-2"
    assert ring.find("my-secret-ke") is None
    assert ring.find("\udcff") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com", "my-host"])  # noqa: S104
def test_no_other_address_without_a_key(host: str) -> None:
    with pytest.raises(ParameterError, match="api-key") as caught:
        ServerConfig(host=host).validate()
    assert caught.value.field == "host"
    ServerConfig(host=host, api_key=("long-enough",)).validate()


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("127.0.0.1.example.com", "0.0.0.0", "localhost.example.com"))  # noqa: S104


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]"])
def test_a_web_page_cannot_come_in_under_its_own_name(parrot: Running, host: str) -> None:
    response = parrot.client.get("/v1/models", headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    for good in ("localhost", "localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert parrot.client.get("/v1/models", headers={"Host": good}).status_code == 200


def test_no_cors(parrot: Running) -> None:
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = parrot.client.options("/v1/chat/completions", headers=origin)
    assert response.status_code == 405
    for found in (response, parrot.client.get("/v1/models", headers=origin)):
        assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(parrot: Running, kind: str) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    response = parrot.client.post("/v1/completions", content=body, headers={"Content-Type": kind} if kind else {})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_headers_of_every_answer(parrot: Running) -> None:
    answers = [
        parrot.client.get("/health"),
        parrot.client.get("/nothing"),
        parrot.chat(max_tokens=2),
        parrot.chat(max_tokens=2, stream=True),
        parrot.chat(temperature=-1),
        parrot.client.get("/v1/models", headers={"Host": "evil.example"}),
    ]
    for response in answers:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers
        assert len(response.headers["x-request-id"]) == 24
    assert len({response.headers["x-request-id"] for response in answers}) == len(answers)


def test_the_clients_request_id(parrot: Running) -> None:
    given = parrot.client.get("/health", headers={"X-Request-Id": "abc.1"})
    assert given.headers["x-request-id"] == "abc.1"
    assert parrot.chat(max_tokens=1, request_id="from-the-body").headers["x-request-id"] == "from-the-body"
    for wrong in ("a b", "x" * 129, "a\tb", 'a"b'):
        response = parrot.client.get("/health", headers={"X-Request-Id": wrong})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Request-Id")
        assert response.headers["x-request-id"] != wrong


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_errors_have_openais_shape(parrot: Running, method: str, path: str, status: int, code: str) -> None:
    response = parrot.client.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 60_000,
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}" * 3,
        b'{"prompt": "a"} x',
        b'{"prompt": "a\x00',
        b"{'prompt': 'a'}",
    ],
)
def test_bodies_that_are_no_request(parrot: Running, body: bytes) -> None:
    response = parrot.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 1000


def test_size_of_a_body() -> None:
    """Refused by its announced length, or when it has become too long; never read whole."""
    with running(scripted(ScriptedExecutor(model=saying("ok"))), max_body_mib=0.01) as server:
        fits = json.dumps({"prompt": "a", "user": "x" * 1000}).encode()
        large = json.dumps({"prompt": "a" * 20_000}).encode()
        headers = {"Content-Type": "application/json"}
        assert server.client.post("/v1/completions", content=fits, headers=headers).status_code == 200
        announced = server.client.post("/v1/completions", content=large, headers=headers)
        chunked = server.client.post("/v1/completions", content=iter([large[:9000], large[9000:]]), headers=headers)
        for response in (announced, chunked):
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 999999999999999\r\n\r\n"
            )
            assert b" 413 " in raw.recv(1000).splitlines()[0]
        assert server.client.post("/v1/completions", content=fits, headers=headers).status_code == 200


def test_a_body_that_does_not_come() -> None:
    with running(scripted(), body_timeout=1.0) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b'Content-Length: 100\r\n\r\n{"prompt"'
            )
            raw.settimeout(60)
            assert b" 408 " in raw.recv(1000).splitlines()[0]
        assert server.complete("a").status_code == 200


def test_the_log_has_one_line_and_no_text(parrot: Running, caplog: pytest.LogCaptureFixture) -> None:
    from liushui.server.visit import LOG

    LOG.propagate = True
    with caplog.at_level(logging.INFO, "liushui.server"):
        parrot.chat("the secret prompt", max_tokens=60, request_id="find-me")
        parrot.chat("the secret prompt", temperature=-1)
        end = time.monotonic() + 60
        while True:  # lines of earlier tests' requests may still come in between
            lines = [one.facts for one in caplog.records if one.getMessage() == "request"]
            answered = [one for one in lines if one.get("request_id") == "find-me"]
            refused = [one for one in lines if one.get("code") == "invalid_value"]
            if answered and refused:
                break
            assert time.monotonic() < end
            time.sleep(0.005)
    assert len(answered) == 1
    assert answered[0]["finish"] == "stop"
    assert answered[0]["completion_tokens"] == len("Hello, 你好 👋!".encode()) + 1
    assert refused[-1]["status"] == 400
    assert "secret" not in repr(caplog.records)
    assert "Hello" not in repr(lines)


@pytest.mark.parametrize("as_json", [True, False])
def test_lines_of_log(as_json: bool) -> None:
    from liushui.server.visit import LineFormatter

    record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
    record.facts = {"path": "/v1/a\nb", "status": 200}
    line = LineFormatter(as_json).format(record)
    assert "\n" not in line  # what a client sends cannot make a line of its own
    if as_json:
        assert json.loads(line)["path"] == "/v1/a\nb"


def test_what_goes_wrong_inside_stays_inside(caplog: pytest.LogCaptureFixture) -> None:
    """An error in our own code: a code and an id for the client, the trace in the log."""
    engine = scripted()

    async def submit(request: Any) -> Any:
        raise RuntimeError("/secret/path 0x7f00")

    engine.submit = submit  # type: ignore[method-assign]
    with running(engine) as server:
        from liushui.server.visit import LOG

        LOG.propagate = True
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
            assert "secret" not in response.text
            assert response.headers["x-request-id"]
    assert "/secret/path" in caplog.text
