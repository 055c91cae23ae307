"""The body of /v1/chat/completions, and of /tokenize with messages."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema, model_validator

from liushui.server.errors import ApiError
from liushui.server.schema.common import MAX_NAME, MAX_TOP, NO_TOOLS, REFUSED, TEXT_ONLY, Count, Generation, Refused

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOL_CALLS = 128
MAX_VARIABLES = 64
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
        {"type": "null"},
    ]
}


def _content(value: Any) -> Any:
    """Text, or text parts. Nothing else is read: no image, and above all no URL."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    if not 0 < len(value) <= MAX_PARTS:
        raise ValueError(f"must have 1 to {MAX_PARTS} parts, not {len(value)}")
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"is {kind[:40]!r}" if isinstance(kind, str) and kind != "text" else "is not one"
            raise ValueError(f'must hold parts {{"type": "text", "text": "..."}}, and [{i}] {what}: {TEXT_ONLY}')
        if extra := set(part) - {"type", "text"}:
            raise ValueError(f"[{i}] has a field that is not known here: {min(extra)[:MAX_NAME]}")
    return value


class Message(BaseModel):
    """One message. What the model's chat template does not show is refused, so that nothing is dropped silently."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Role
    content: Annotated[Any, BeforeValidator(_content), WithJsonSchema(CONTENT_SCHEMA)] = None
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    reasoning_content: str | None = None
    type: Literal["text", "message"] | None = None
    """Says nothing new; some clients (lm-eval) write it."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content must be a string or a list of text parts")
        return self


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **REFUSED,
        "tools": Refused(NO_TOOLS, ([],)),
        "tool_choice": Refused(NO_TOOLS, ("none", "auto")),
        "functions": Refused(NO_TOOLS, ([],)),
        "function_call": Refused(NO_TOOLS, ("none", "auto")),
        "parallel_tool_calls": Refused(NO_TOOLS, (True, False)),
        "modalities": Refused(TEXT_ONLY, (["text"],)),
        "audio": Refused(TEXT_ONLY),
        "prediction": Refused("answers do not get faster by it here; leave it out"),
        "reasoning_effort": Refused("the model has no such setting; see chat_template_kwargs", ("none",)),
        "include_reasoning": Refused("the model's words are not sorted into reasoning and answer", (True,)),
        "verbosity": Refused("the model has no such setting; ask in the prompt", ("medium",)),
        "web_search_options": Refused("the server fetches nothing"),
        "echo": Refused("a chat answer does not repeat its prompt; see return_token_ids", (False,)),
        "continue_final_message": Refused("use /v1/completions with the rendered prompt", (False,)),
        "documents": Refused("send them as chat_template_kwargs, if the model's template has such a variable"),
        "chat_template": Refused("templates are the operator's: --chat-template FILE"),
        "return_prompt_text": Refused("see return_token_ids and /detokenize", (False,)),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    """The older name of max_completion_tokens."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    add_generation_prompt: StrictBool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    """Variables of the model's chat template, such as enable_thinking; others are refused."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "invalid_value", "top_logprobs: only with logprobs: true", param="top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            message = "max_tokens: is the older name of max_completion_tokens, and the two differ; send one"
            raise ApiError(400, "invalid_value", message, param="max_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Log-probabilities of the k most likely tokens; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
