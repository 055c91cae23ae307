"""The door: the first thing a request meets, whatever its path.

Nothing gets past it without a key, where there are keys: a route is closed unless it is named here. Every answer gets
its X-Request-Id and the headers that keep browsers from guessing; every request leaves one line of log.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic_core import to_json

from liushui.server.errors import INTERNAL, ApiError
from liushui.server.keys import MAX_KEY, NOBODY, Key, KeyRing
from liushui.server.schema.common import REQUEST_ID
from liushui.server.settings import ServerConfig
from liushui.server.traces import caller_of
from liushui.server.visit import LOG, VISIT, Visit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/ready"})
"""Paths that need no key; they say yes or no and nothing else."""
ADMIN = ("/metrics", "/debug/", "/openapi.json")
"""Beginnings of paths that need a key with admin."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_REQUEST_ID = re.compile(REQUEST_ID)
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Door:
    """ASGI middleware, the outermost."""

    def __init__(self, app: App, keys: KeyRing, config: ServerConfig, count: Callable[[Visit], None]) -> None:
        """`count`: told of every visit at its end."""
        self._app = app
        self._keys = keys
        self._config = config
        self._count = count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = self._visit(scope)
        scope[VISIT] = visit
        try:
            await self._let_in(visit, scope, receive, send)
        finally:
            self._count(visit)
            if visit.path not in OPEN or visit.status >= 500:
                LOG.info("request", extra={"facts": visit.record()})

    def _visit(self, scope: Message) -> Visit:
        config = self._config
        return Visit(
            request_id=secrets.token_hex(12),
            method=scope["method"],
            path=scope["path"],
            key=NOBODY,
            started=time.monotonic(),
            max_body=config.max_body,
            body_timeout=config.body_timeout,
            write_timeout=config.write_timeout,
        )

    async def _let_in(self, visit: Visit, scope: Message, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *HEADERS,
                    (b"x-request-id", visit.request_id.encode()),
                ]
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._name(visit, headers)
            visit.key = self._who(scope["path"], headers)
            visit.caller = caller_of(scope["headers"])
            await self._app(scope, receive, send_with_headers)
        except ApiError as error:
            await respond(visit, error, send_with_headers)
        except Exception:
            LOG.exception("failed", extra={"facts": visit.record()})
            if not visit.status:  # nothing was sent yet
                await respond(visit, ApiError(500, "internal_error", INTERNAL), send_with_headers)

    def _name(self, visit: Visit, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"x-request-id")
        if given is None:
            return
        text = given.decode("latin-1")
        if not _REQUEST_ID.fullmatch(text):
            message = "X-Request-Id: must have 1 to 128 letters, digits, or . _ : -"
            raise ApiError(400, "invalid_value", message, param="X-Request-Id")
        visit.request_id = text

    def _who(self, path: str, headers: dict[bytes, bytes]) -> Key:
        if not len(self._keys):
            self._check_host(headers)
            return NOBODY
        if path in OPEN:
            return Key("")
        scheme, _, presented = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = None
        if scheme.lower() == "bearer" and len(presented) <= MAX_KEY:
            key = self._keys.find(presented.strip())
        if key is None:
            message = "send a key that this server knows: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        if path.startswith(ADMIN) and not key.admin:
            raise ApiError(403, "not_permitted", "this needs a key with admin = true")
        return key

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Without keys, a web page must not reach this machine's server under a name of its own (DNS rebinding)."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if name and name not in _LOCAL_NAMES and name != self._config.host:
            message = "without API keys, only localhost is answered; start the server with --api-key-file (SECURITY.md)"
            raise ApiError(403, "host_not_allowed", message)


async def respond(visit: Visit, error: ApiError, send: Send) -> None:
    """Answer with an error."""
    visit.code = error.code
    body = to_json(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
