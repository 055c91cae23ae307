"""What a user asks for: `SamplingParams`, and the immutable `Request` made from it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from liushui.errors import ParameterError

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOPS = 64
MAX_LOGIT_BIAS = 1024
LEAST_REPETITION_PENALTY = 0.01
"""Logits are divided by it: by far less, float32 would overflow."""


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    """Its deadline passed, in the queue or in the batch."""
    ERROR = "error"


class _Given:
    """Remembers which of its fields were named when it was made: those that no default may replace."""

    __slots__ = ("given",)
    given: frozenset[str]

    def __new__(cls, *args: Any, **named: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "given", frozenset(named).union(cls.names()[: len(args)]))
        return made

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]  # a dataclass below

    def __reduce__(self) -> Any:
        return _remade, (type(self), {name: getattr(self, name) for name in self.names()}, self.given)


def _remade(cls: Any, values: Mapping[str, Any], given: frozenset[str]) -> Any:
    return cls(**values).giving(given)


@dataclass(frozen=True, slots=True)
class SamplingParams(_Given):
    """How to choose tokens and when to stop; names and meanings as in vLLM and the OpenAI API.

    Raises `ParameterError`, naming the field, for a value that cannot be honoured. `given` are the fields that were
    named, with whatever value: the model's own defaults, where they are asked for, fill in the others.
    """

    n: int = 1
    """Answers per prompt; answer i uses seed + i."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides (or, when negative, multiplies) the logit of every token seen in prompt or output; 0.01 to 100."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    """None: the engine draws one and reports it."""
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    """None: until the model stops or its context is full."""
    logprobs: int | None = None
    """None: none; k: of the chosen token and the k most likely."""
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    """Keep at most this many prompt tokens (the side is `EngineConfig.truncation_side`)."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.stop is not None and not isinstance(self.stop, str | list | tuple):
            raise ParameterError("stop", f"must be a string or a list of strings, got {self.stop!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        self._check_numbers()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # as vLLM: below that, dividing would overflow

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop  # type: ignore[return-value]  # normalised in __post_init__

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise ParameterError(
                    "min_tokens", f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens is not None:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, f"must be true or false, got {getattr(self, name)!r}")

    def _check_stops(self) -> None:
        if len(self.stop_strings) > MAX_STOPS:
            raise ParameterError("stop", f"at most {MAX_STOPS} strings, got {len(self.stop_strings)}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ParameterError("stop", f"must hold non-empty strings, got {text!r}")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ParameterError("stop", f"must be valid Unicode: half of a surrogate pair in {text!r}")
        if len(self.stop_token_ids) > MAX_STOPS:
            raise ParameterError("stop_token_ids", f"at most {MAX_STOPS} ids, got {len(self.stop_token_ids)}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def replaced(self, **changes: Any) -> "SamplingParams":
        """A copy with these fields given too. (For `dataclasses.replace` all fields of the copy are given.)"""
        return replace(self, **changes).giving(self.given | changes.keys())

    def filled(self, defaults: Mapping[str, Any]) -> "SamplingParams":
        """A copy whose fields that were not given have the values of `defaults`, and are still not given."""
        missing = {name: value for name, value in defaults.items() if name not in self.given}
        return replace(self, **missing).giving(self.given) if missing else self

    def giving(self, names: Iterable[str]) -> "SamplingParams":
        """A copy of which exactly the fields `names` count as given."""
        made = replace(self)
        object.__setattr__(made, "given", frozenset(names))
        return made


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ParameterError(name, f"must be a finite number, got {value!r}")
    if not (low < value if open_low else low <= value) or value > high:
        raise ParameterError(name, f"must be in {'(' if open_low else '['}{low}, {high}], got {value}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(name, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ParameterError(name, f"must be in [{low}, {high}], got {value}")


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ParameterError("logit_bias", f"must map token ids to numbers, got {bias!r}")
    if len(bias) > MAX_LOGIT_BIAS:
        raise ParameterError("logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(bias)}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isdecimal():  # JSON has only string keys
            token = int(token)
        _integer("logit_bias", token, 0, 2**31 - 1)
        _number("logit_bias", value, -100.0, 100.0)
        checked[token] = float(value)
    return checked


@dataclass(frozen=True, slots=True)
class Request:
    """One admitted request, every default resolved: the whole input of the answer."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    """The effective seed of the first answer."""
    max_tokens: int
    """Effective limit of output tokens, >= 1."""
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    """Seconds on the engine's clock."""
    deadline: float | None = None
    """When it must have ended, seconds on the engine's clock."""
    priority: int = 0
    """Lower is served first; equal priorities in order of arrival."""
    tenant: str = ""
    """On whose account: tenants share the engine fairly. Priorities rank among a tenant's own requests."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    prompt_logprobs_from: int = 0
    """First position whose prompt log-probabilities are wanted, if any are: what lies well before it may be cached."""

    def seq_id(self, index: int) -> str:
        """The name of its answer `index`."""
        return self.request_id if self.sampling.n == 1 else f"{self.request_id}/{index}"
