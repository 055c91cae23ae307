"""What all bodies share: strict types, bounds, and what is refused by name.

A field of a body is one of three things, and nothing else:

    honoured    a field of the model, with its bounds
    ignored     in the class's `ignored`: clients send it, and it does not change the answer
    refused     in the class's `refused`: answered 400 with the field's name and the remedy, unless it has a value that
                asks for nothing ("neutral": null, false, an empty list)

A name that is none of the three is refused too.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from liushui.core.request import LEAST_REPETITION_PENALTY, MAX_LOGIT_BIAS, MAX_N, MAX_STOPS
from liushui.server.errors import ApiError

INT64 = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_TOP = 20
"""Log-probabilities of the most likely tokens: OpenAI's bound for chat."""
MAX_STOP_CHARS = 1024
MAX_PRIORITY = 100
MAX_NAME = 256
MAX_METADATA = 64
MAX_TIMEOUT = 86_400.0
MAX_VALUES, MAX_LISTS = 1 << 20, 1 << 16
"""Of a whole body: numbers, texts, lists and so on; lists and objects, and the names in objects."""

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Bias = Annotated[float, Field(ge=-100, le=100)]
REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"
Count = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]


class Refused(NamedTuple):
    """A field that is known and not supported. `neutral`: values that ask for nothing, besides null."""

    remedy: str
    neutral: tuple[Any, ...] = ()


LATER = "structured output is not there yet; ask for the format in the prompt and check the answer"
NO_TOOLS = "tool calls are not there yet; describe the tools in the prompt and parse the answer"
TEXT_ONLY = "the model reads and writes text only"
NO_BEAM = "beam search is not there; sample with n > 1 and choose"
OTHER_ENGINE = "belongs to another engine"

REFUSED: Mapping[str, Refused] = {
    "store": Refused("answers are not stored; leave it out or send false", (False,)),
    "service_tier": Refused("there is one tier; leave it out, or see priority", ("auto", "default")),
    "moderation": Refused("answers are not moderated"),
    "prompt_cache_retention": Refused("the prefix cache keeps what it has room for; leave it out"),
    "prompt_cache_options": Refused("the prefix cache needs no options; see cache_salt"),
    "best_of": Refused("ask for n answers and choose", (1,)),
    "use_beam_search": Refused(NO_BEAM, (False,)),
    "length_penalty": Refused(NO_BEAM, (1, 1.0)),
    "response_format": Refused(LATER, ({"type": "text"},)),
    "structured_outputs": Refused(LATER),
    "guided_json": Refused(LATER),
    "guided_regex": Refused(LATER),
    "guided_choice": Refused(LATER),
    "guided_grammar": Refused(LATER),
    "guided_decoding_backend": Refused(LATER),
    "guided_whitespace_pattern": Refused(LATER),
    "allowed_token_ids": Refused("use logit_bias to make tokens likely or impossible"),
    "bad_words": Refused("use logit_bias with the tokens' ids", ([],)),
    "logits_processors": Refused("no code is taken from requests", ([],)),
    "logprob_token_ids": Refused("ask for logprobs of the most likely tokens"),
    "spaces_between_special_tokens": Refused("special tokens are written as the tokenizer decodes them", (True,)),
    "truncation_side": Refused("the side is a setting of the server: --truncation-side"),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "repetition_detection": Refused("use repetition_penalty, stop or max_tokens"),
    "thinking_token_budget": Refused("use max_tokens", (-1,)),
    "watermarking": Refused("answers carry no watermark", (False,)),
    "stream_interval": Refused("a chunk is sent for every step", (1,)),
    "routed_experts_prompt_start": Refused("routing of experts is not reported", (0,)),
    "return_token_offsets": Refused("ask for logprobs with echo: text_offset", (False,)),
    "return_mm_kwargs": Refused(TEXT_ONLY, (True,)),
    "media_io_kwargs": Refused(TEXT_ONLY, ({},)),
    "mm_processor_kwargs": Refused(TEXT_ONLY, ({},)),
    "kv_transfer_params": Refused(OTHER_ENGINE),
    "ec_transfer_params": Refused(OTHER_ENGINE),
    "vllm_xargs": Refused(OTHER_ENGINE, ({},)),
}
"""Refused by every endpoint that generates."""


STOPS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}


def _stops(value: Any) -> tuple[str, ...] | None:
    """One text or several; null and an empty list ask for none."""
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError("must be a string or a list of strings")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"must hold at most {MAX_STOPS} strings, not {len(texts)}")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise ValueError(f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(texts) or None


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: StrictBool | None = None
    """A last chunk with the tokens used and no choices."""
    continuous_usage_stats: StrictBool | None = None
    """The tokens used so far in every chunk (vLLM's extension)."""
    include_obfuscation: StrictBool | None = None
    """Only false: chunks are not padded."""

    @field_validator("include_obfuscation")
    @classmethod
    def _no_padding(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("chunks are not padded here; leave it out or send false")
        return value


class Body(BaseModel):
    """A JSON body. `read` makes one from parsed JSON, or raises `ApiError` 400 naming the field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())
    refused: ClassVar[Mapping[str, Refused]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    model: Name | None = None
    """One of the names in /v1/models. Left out: the model that is served."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ApiError(400, "invalid_json", "the body must be a JSON object")
        kept = {}
        for name, value in data.items():
            if name in cls.refused:
                remedy, neutral = cls.refused[name]
                # 1 == True == 1.0 in Python: only a value of the same kind is neutral
                if value is not None and not any(value == item and type(value) is type(item) for item in neutral):
                    raise ApiError(400, "unsupported_field", f"{name} is not supported: {remedy}", param=name)
            elif name not in cls.model_fields:
                raise unknown(name, [*cls.model_fields, *cls.refused])
            else:
                kept[name] = value
        return kept

    @classmethod
    def read(cls, data: Any) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid(error) from None

    @classmethod
    def schema_for_docs(cls) -> dict[str, Any]:
        """JSON schema, for /openapi.json: honoured and ignored fields."""
        return cls.model_json_schema(ref_template="#/components/schemas/{model}")

    def given(self, *names: str) -> dict[str, Any]:
        """The fields among `names` that the client sent and that are not null."""
        return {
            name: value
            for name in names
            if name in self.model_fields_set and (value := getattr(self, name)) is not None
        }


class Sampling(Body):
    """How tokens are chosen. Meanings and defaults: `SamplingParams`."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION_PENALTY, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    """Token id (JSON has only strings as keys) -> number added to its logit."""
    seed: Annotated[int, Field(ge=-(2**63), le=INT64)] | None = None


class Stopping(Sampling):
    """When an answer ends, and what of it is sent."""

    stop: Annotated[Any, BeforeValidator(_stops), WithJsonSchema(STOPS_SCHEMA)] = None
    """Text, or a list of texts, that end the answer."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    """-1: what the context has room for beside max_tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None


class Generation(Stopping):
    """How the server treats the request, and what a client may say without changing the answer."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key", "session_id"}
    )

    add_special_tokens: StrictBool | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Lower is served first."""
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = None
    """Instead of the header X-Request-Id."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    """Seconds until the answer must be there; then it ends with what there is of it."""
    return_timings: StrictBool | None = None
    """`timings` in the answer; so does the header X-Return-Timings: true."""
    return_params: StrictBool | None = None
    """`effective_params` in the answer."""
    user: Annotated[str, Field(max_length=1024)] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=MAX_METADATA)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    session_id: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "invalid_value", "stream_options: only with stream: true", param="stream_options")
        return self

    @property
    def answers(self) -> int:
        """Answers per prompt."""
        return 1 if self.n is None else self.n

    @property
    def streams(self) -> bool:
        return bool(self.stream)


def unknown(name: str, known: list[str]) -> ApiError:
    """The answer for a field that does not exist."""
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    name = name[:MAX_NAME]
    return ApiError(400, "unknown_field", f"{name} is not a field of this endpoint{hint}", param=name)


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its path. The value is not repeated: it may be long, or somebody's."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, "unknown_field", f"{param} is not known here", param=param)
    if first["type"] == "missing":
        return ApiError(400, "missing_field", f"{param}: is required", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_value", f"{param}: {message[:1].lower()}{message[1:]}", param=param or None)


def path(location: Iterable[str | int]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:MAX_NAME]}" if text else part[:MAX_NAME]
    return text
