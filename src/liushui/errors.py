"""Errors a user can cause. Each says which input is wrong and what to do about it."""


class LiushuiError(Exception):
    """Base of every error that is shown to a person without a trace."""


class ParameterError(LiushuiError, ValueError):
    """A parameter has a value that cannot be honoured.

    `field` is the parameter's public name, so that a server can answer 400 with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class CapacityError(ParameterError):
    """The request can never fit (context length or KV cache), however long it waits."""


class ModelError(LiushuiError):
    """A model cannot be found, read, or is not supported."""


class WeightError(ModelError):
    """A tensor is missing, unexpected or misshapen; the message names it."""


class Overloaded(LiushuiError):
    """A request is refused now, and may be sent again later: the queue is full, or the engine drains or restarts.

    `retry_after`: seconds, from the measured rate. `reason`: queue_requests, queue_tokens, starting, draining, failed.
    """

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
