"""What a client is told when something is wrong: OpenAI's shape, stable codes, no details of this machine.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}
"""

from collections.abc import Mapping
from typing import Any

from liushui.errors import CapacityError, LiushuiError, ModelError, Overloaded, ParameterError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status -> the error's type."""

ANSWER_STATUS = {"timeout": 504}
"""`RequestOutput.error_code` -> HTTP status; all others are 500."""


class ApiError(Exception):
    """An answer that is an error. `param` is the field's path, as in "messages[0].content"."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, int(-(-retry_after // 1))))  # whole seconds, rounded up

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def refusal(error: LiushuiError, names: Mapping[str, str] | None = None) -> ApiError:
    """The answer for a refusal by the engine. `names`: the engine's field -> the client's word for it."""
    if isinstance(error, Overloaded):
        return ApiError(503, error.reason, str(error), retry_after=error.retry_after)
    if isinstance(error, ParameterError):
        param = (names or {}).get(error.field, error.field)
        message = f"{param}{str(error)[len(error.field) :]}" if str(error).startswith(error.field) else str(error)
        code = "context_length_exceeded" if isinstance(error, CapacityError) else "invalid_value"
        return ApiError(400, code, message, param=param)
    if isinstance(error, ModelError):
        return ApiError(400, "model_cannot", str(error))
    return ApiError(500, "internal_error", INTERNAL)


def failed(code: str | None, message: str | None) -> ApiError:
    """The answer for a request that was accepted and could not be finished."""
    if code == "timeout":
        return ApiError(504, code, message or "the request's time was over before its first token", param="timeout")
    if code == "engine_died":
        return ApiError(500, code, "the engine stopped while this request was answered; it may be sent again")
    if code == "aborted":
        return ApiError(500, code, "the request was cancelled")
    return ApiError(500, code or "model_error", "the model could not finish this answer; the server's log says why")


INTERNAL = "something went wrong here; the server's log has it under this answer's X-Request-Id"
