"""The body of /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, StrictBool, TypeAdapter, ValidationError, WithJsonSchema, model_validator

from liushui.server.errors import ApiError
from liushui.server.schema.common import MAX_TOKEN_ID, MAX_TOP, REFUSED, Count, Generation, Refused, TokenId

MAX_PROMPTS = 512
MAX_ANSWERS = 1024
"""Prompts x n of one request."""

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
_TOGETHER = 1 << 16
"""Token ids that are looked at in one go: between two, others have their turn."""
_TOKEN_IDS: TypeAdapter[list[int]] = TypeAdapter(Annotated[list[TokenId], Field(min_length=1, strict=True)])


def _token_ids(value: list[Any], where: str = "") -> list[int]:
    found: list[int] = []
    try:
        while len(found) < max(len(value), 1):
            found += _TOKEN_IDS.validate_python(value[len(found) : len(found) + _TOGETHER], strict=True)
    except ValidationError as error:
        location = error.errors(include_input=False)[0]["loc"]
        place = "".join(f"[{int(part) + len(found)}]" for part in location)
        raise ValueError(f"{where}{place or ' '} must be token ids, 0 to {MAX_TOKEN_ID}, at least one") from None
    return found


def _prompts(value: Any) -> list[str | list[int]]:
    """The four shapes of OpenAI's `prompt` as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}; send several requests")
    kind = type(value[0])
    if kind not in (str, list) or not all(type(item) is kind for item in value):
        raise ValueError("must hold prompts of one kind: strings, or lists of token ids")
    return value if kind is str else [_token_ids(item, f"[{i}]") for i, item in enumerate(value)]


class CompletionRequest(Generation):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "suffix": Refused("the model only continues text", ("",)),
    }

    prompt: Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    """Default: 16, as OpenAI's. 0, with echo: the prompt's own log-probabilities."""
    max_completion_tokens: Count | None = None
    """The chat endpoint's name of max_tokens: some clients (GuideLLM) send both everywhere."""
    echo: StrictBool | None = None
    """The prompt in front of the answer; with logprobs, its log-probabilities too."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.prompt) * self.answers > MAX_ANSWERS:
            message = f"n: {len(self.prompt)} prompts with {self.answers} answers each are more than {MAX_ANSWERS}"
            raise ApiError(400, "invalid_value", message, param="n")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "invalid_value", "max_tokens: 0 only with echo: true", param="max_tokens")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            message = "max_tokens: and max_completion_tokens are one setting, and the two differ; send one"
            raise ApiError(400, "invalid_value", message, param="max_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer, by whichever name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
