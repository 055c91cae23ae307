"""The application: every route, and what stands in front of them.

door        key, request id, headers, one line of log        door.py
routes      bodies that are bounded in one schema             schema/
house       into the engine and out again                     house.py, chat.py, completions.py
engine      a face on a loop that runs elsewhere              liushui.engine.serving
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from liushui import __version__
from liushui.engine.serving import ServingEngine
from liushui.errors import LiushuiError
from liushui.server import small
from liushui.server.chat import chat_completions
from liushui.server.completions import completions
from liushui.server.door import Door
from liushui.server.errors import INTERNAL, ApiError, refusal
from liushui.server.house import House
from liushui.server.keys import KeyRing
from liushui.server.metrics import Metrics
from liushui.server.schema.chat import ChatRequest
from liushui.server.schema.common import Body
from liushui.server.schema.completions import CompletionRequest
from liushui.server.schema.tokenize import DetokenizeRequest, TokenizeRequest
from liushui.server.settings import ServerConfig
from liushui.server.traces import OPERATIONS
from liushui.server.visit import Visit
from liushui.server.wire import GONE, ClientGoneError, JsonResponse, visit_of

if TYPE_CHECKING:
    from liushui.server.otlp import Traces

Endpoint = Callable[[House, Request], Awaitable[Response]]
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own would tell a collector what requests say that fail; ours is otlp.py. (Before 0.165 it has none.)"""


def build_app(
    engine: ServingEngine, config: ServerConfig, keys: KeyRing | None = None, traces: "Traces | None" = None
) -> Door:
    """The server around a started engine, as an ASGI application; `.routes` lists its paths."""
    keys = KeyRing.load(config) if keys is None else keys
    house, metrics = House(engine, keys, config), Metrics(engine, config.metrics_compat, traces)
    app = FastAPI(
        title="liushui",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,  # it would send a client to whatever its Host header says
        telemetry=NO_TELEMETRY,
    )
    _add_posts(app, house)
    _add_gets(app, house, metrics)
    _add_errors(app)

    def ended(visit: Visit) -> None:
        metrics.count(visit)
        if traces is not None:
            traces.ended(visit)

    return Door(app, keys, config, ended)


def _add_posts(app: FastAPI, house: House) -> None:
    bodies: list[tuple[str, Endpoint, type[Body]]] = [
        ("/v1/chat/completions", chat_completions, ChatRequest),
        ("/v1/completions", completions, CompletionRequest),
        ("/tokenize", small.tokenize, TokenizeRequest),
        ("/detokenize", small.detokenize, DetokenizeRequest),
    ]
    for path, endpoint, body in bodies:
        content = {"application/json": {"schema": inlined(body.model_json_schema())}}
        app.add_api_route(
            path,
            _bound(endpoint, house),
            methods=["POST"],
            name=endpoint.__name__,
            openapi_extra={"requestBody": {"required": True, "content": content}},
            response_class=JsonResponse,
            responses={status: {"description": "Refused; see code."} for status in (400, 401, 404, 413, 429, 503)},
        )


def _add_gets(app: FastAPI, house: House, metrics: Metrics) -> None:
    created = int(time.time())

    async def models(request: Request) -> Response:
        names = house.engine.info.served_names
        return JsonResponse({"object": "list", "data": [small.model_card(house, name, created) for name in names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        house.check_model(name)
        return JsonResponse(small.model_card(house, name, created))

    async def health(request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    gets: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/v1/models", models),
        ("/v1/models/{name:path}", model),
        ("/tokenizer_info", _bound(small.tokenizer_info, house)),
        ("/health", health),
        ("/ready", _bound(small.ready, house)),
        ("/metrics", partial(small.metrics, metrics)),
        ("/debug/requests", _bound(small.debug_requests, house)),
    ]
    for path, endpoint in gets:
        app.add_route(path, _plain(endpoint), methods=["GET"])


def _bound(endpoint: Endpoint, house: House) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await endpoint(house, request)

    return route


def _plain(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        return await endpoint(request)

    return route


def _add_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        if isinstance(error, LiushuiError):
            error = refusal(error)
        assert isinstance(error, ApiError)  # noqa: S101 (registered for these two)
        visit_of(request).code = error.code
        return JsonResponse(error.body(), status_code=error.status, headers=error.headers)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        code, message = {
            404: ("not_found", f"there is no such path here; answers are at {' and '.join(OPERATIONS)}"),
            405: ("method_not_allowed", f"{request.method} is not for this path"),
        }.get(error.status_code, ("http_error", "this request cannot be answered"))
        return await api_error(request, ApiError(error.status_code, code, message, headers=error.headers))

    async def gone(request: Request, error: Exception) -> Response:
        visit_of(request).code = "client_gone"
        return Response(status_code=GONE)

    async def internal(request: Request, error: Exception) -> Response:
        return await api_error(request, ApiError(500, "internal_error", INTERNAL))  # the door logs it

    app.add_exception_handler(Exception, internal)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(LiushuiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGoneError, gone)


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references: it will stand inside another document."""
    definitions = schema.get("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rpartition("/")[2]])
            return {name: resolve(value) for name, value in node.items() if name != "$defs"}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
