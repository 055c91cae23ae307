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
