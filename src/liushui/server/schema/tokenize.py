"""The bodies of /tokenize and /detokenize, as in vLLM."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, StrictBool, model_validator

from liushui.server.errors import ApiError
from liushui.server.schema.chat import MAX_MESSAGES, MAX_VARIABLES, ChatRequest, Message
from liushui.server.schema.common import MAX_VALUES, Body, Refused, TokenId


class TokenizeRequest(Body):
    """POST /tokenize: of a prompt, or of messages through the chat template."""

    refused: ClassVar[Mapping[str, Refused]] = {
        name: ChatRequest.refused[name]
        for name in ("tools", "documents", "chat_template", "continue_final_message", "media_io_kwargs")
    } | {"mm_processor_kwargs": ChatRequest.refused["mm_processor_kwargs"]}

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: StrictBool | None = None
    """Default: true for a prompt, false for messages (the template writes what there is)."""
    add_generation_prompt: StrictBool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "missing_field", "prompt: send prompt or messages, one of the two", param="prompt")
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name) is not None:
                raise ApiError(400, "invalid_value", f"{name}: only with messages", param=name)
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_VALUES)]
