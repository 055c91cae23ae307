"""A prompt and its parameters become a `Request`, or are refused by name. Nothing is changed silently."""

import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from liushui.config import Side
from liushui.core.request import Request, SamplingParams
from liushui.engine.outputs import EffectiveParams, Source
from liushui.errors import CapacityError, ParameterError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

_SEED_BITS = 48
"""Drawn seeds stay exact in JSON readers that know only doubles, with room for seed + i."""


class PromptEncoder(Protocol):
    """What turns a prompt into token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids as the model expects a document to begin (with BOS where it does)."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit into."""

    max_model_len: int
    """Tokens of prompt and answer."""
    kv_tokens: int
    """Tokens of prompt and answer that the whole KV cache can hold for one sequence."""
    vocab_size: int
    """Rows of the embedding: valid token ids are 0 .. vocab_size - 1."""

    @property
    def longest(self) -> int:
        return min(self.max_model_len, self.kv_tokens)

    @property
    def name(self) -> str:
        """What sets the longest sequence, with its number."""
        if self.max_model_len <= self.kv_tokens:
            return f"max_model_len is {self.max_model_len:,}"
        return f"the KV cache holds {self.kv_tokens:,} (see kv_cache_gib)"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, ready to be submitted."""

    request: Request
    index: int = 0
    """Position in the caller's input."""
    prompt: str | None = None
    truncated_tokens: int = 0
    stream: bool = False
    """Whether deltas are wanted besides the final output."""
    suggested: frozenset[str] = frozenset()
    """Parameters that the request left open and the model's files filled in."""

    def effective_params(self) -> EffectiveParams:
        """Every sampling parameter as it is used, and where it comes from."""
        request, params = self.request, self.request.sampling
        values = {name: getattr(params, name) for name in SamplingParams.names()}
        sources: dict[str, Source] = {name: self._source(name) for name in values}
        if params.seed is None and not params.greedy:
            sources["seed"] = "drawn"
        if params.max_tokens is None:
            sources["max_tokens"] = "fitted"
        return EffectiveParams(values | {"seed": request.seed, "max_tokens": request.max_tokens}, sources)

    def _source(self, name: str) -> Source:
        if name in self.request.sampling.given:
            return "request"
        return "generation_config" if name in self.suggested else "default"


class InputProcessor:
    """Validate -> tokenize -> truncate -> resolve max_tokens and seed -> refuse what cannot fit."""

    def __init__(
        self,
        encoder: PromptEncoder,
        limits: Limits,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        truncation_side: Side = "left",
        seed: int | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`sampling_defaults`: fields of `SamplingParams` for requests that leave them open."""
        self.limits = limits
        self.sampling_defaults = dict(sampling_defaults or {})
        self._encoder = encoder
        self._eos = frozenset(eos_token_ids)
        self._bos = bos_token_id
        self._side = truncation_side
        self._seeds = random.Random(seed)  # noqa: S311 (no secret)
        self._next_id = 0

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        now: float,
        index: int = 0,
        request_id: str | None = None,
        prompt_text: str | None = None,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        prompt_logprobs_from: int = 0,
    ) -> Prepared:
        """`now`: time of arrival, seconds on the engine's clock. `prompt_text`: what the caller made token ids from.
        Raises `ParameterError` naming the field."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ParameterError("sampling_params", f"must be SamplingParams, got {type(params).__name__}")
        params = self.filled(params)
        if request_id is not None and (not isinstance(request_id, str) or not request_id or "/" in request_id):
            raise ParameterError("request_id", f"must be a non-empty string without '/', got {request_id!r}")
        if params.truncate_prompt_tokens is None and isinstance(prompt, list):
            self._max_tokens(len(prompt), params)  # far too many are not looked at one by one
        text, ids = self._token_ids(prompt)
        text = text if text is not None else prompt_text
        self._check_ids(ids, params)
        kept = self._truncate(ids, params.truncate_prompt_tokens, from_text=text is not None)
        max_tokens = self._max_tokens(len(kept), params)
        request = Request(
            request_id=request_id if request_id is not None else self.new_id(),
            prompt_token_ids=tuple(kept),
            sampling=params,
            seed=self._seed(params),
            max_tokens=max_tokens,
            eos_token_ids=self._eos,
            arrival_time=now,
            priority=priority,
            cache_salt=cache_salt,
            prompt_logprobs_from=prompt_logprobs_from,
        )
        suggested = frozenset(self.sampling_defaults) - params.given
        return Prepared(request, index, text, len(ids) - len(kept), stream, suggested)

    def filled(self, params: SamplingParams) -> SamplingParams:
        """What `params` leave open, as the model's files suggest it, if that was asked for."""
        try:
            return params.filled(self.sampling_defaults)
        except ParameterError as error:
            message = f"{str(error)[len(error.field) + 2 :]} (generation_config fills in what is not given)"
            raise ParameterError(error.field, message) from None

    def _token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of any form of prompt."""
        text: Any = None
        ids: Any = None
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"}, key=str)
            if unknown:
                raise ParameterError("prompt", f"unknown key {unknown[0]!r}; known: prompt, prompt_token_ids")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if (text is None) == (ids is None):
                raise ParameterError("prompt", "must have exactly one of the keys prompt and prompt_token_ids")
        elif isinstance(prompt, str):
            text = prompt
        else:
            ids = prompt
        return (self._encoded(text)) if text is not None else (None, _integers(ids))

    def _encoded(self, text: Any) -> tuple[str, list[int]]:
        if not isinstance(text, str):
            raise ParameterError("prompt", f"must be text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParameterError("prompt", f"is not valid Unicode: {error.reason} at {error.start}") from None
        ids = list(self._encoder.encode(text))
        if not ids:
            raise ParameterError("prompt", "is empty; give at least one token")
        return text, ids

    def _check_ids(self, ids: Sequence[int], params: SamplingParams) -> None:
        size = self.limits.vocab_size
        named = {
            "prompt_token_ids": ids,
            "logit_bias": params.logit_bias or (),
            "stop_token_ids": params.stop_token_ids,
        }
        for name, token_ids in named.items():
            if not token_ids or (min(token_ids) >= 0 and max(token_ids) < size):
                continue
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < size)
            raise ParameterError(name, f"must be in 0 .. {size - 1:,} (the vocabulary), got {wrong}")

    def _truncate(self, ids: list[int], keep: int | None, *, from_text: bool) -> list[int]:
        """The part of `ids` that is kept. Cut on the left, a text keeps the BOS that begins every document."""
        if keep is None or len(ids) <= keep:
            return ids
        if self._side == "right":
            return ids[:keep]
        if from_text and self._bos is not None and ids[0] == self._bos:
            return [self._bos, *ids[len(ids) - keep + 1 :]]
        return ids[-keep:]

    def _max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        room = self.limits.longest - num_prompt
        if room < 1:
            raise CapacityError(
                "prompt",
                f"{num_prompt:,} tokens, but {self.limits.name}; shorten it or set truncate_prompt_tokens"
                if room < 0
                else f"{num_prompt:,} tokens leave no room for an answer: {self.limits.name}; "
                "shorten it or set truncate_prompt_tokens",
            )
        wanted = params.max_tokens
        if wanted is None:
            if params.min_tokens > room:
                raise CapacityError("min_tokens", self._too_many(params.min_tokens, num_prompt, room, "lower it"))
            return room
        if wanted > room:
            advice = f"ask for at most {room:,}"
            raise CapacityError("max_tokens", self._too_many(wanted, num_prompt, room, advice))
        return wanted

    def _too_many(self, wanted: int, num_prompt: int, room: int, advice: str) -> str:
        return (
            f"{wanted:,} tokens, but after a prompt of {num_prompt:,} there is room for {room:,}: "
            f"{self.limits.name}; {advice}"
        )

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is None:
            return 0 if params.greedy else self._seeds.getrandbits(_SEED_BITS)
        if params.seed + params.n - 1 >= 2**63:
            raise ParameterError("seed", f"answer i uses seed + i, which must stay below 2**63; n is {params.n}")
        return params.seed

    def new_id(self) -> str:
        """An id no request had."""
        self._next_id += 1
        return f"req-{self._next_id - 1}"


def with_index(error: ParameterError, index: int) -> ParameterError:
    """The same refusal, naming which prompt of a list it is about."""
    return type(error)(f"prompts[{index}]", str(error))


def _integers(ids: Any) -> list[int]:
    if isinstance(ids, bytes | bytearray) or not hasattr(ids, "__iter__"):
        raise ParameterError(
            "prompt", f"must be text, a list of token ids, or a mapping; got {ids!r:.40} ({type(ids).__name__})"
        )
    found = list(ids)
    odd = set(map(type, found)) != {int}  # a server's are not: a million of them are looked at in no time
    for i, token in enumerate(found if odd else ()):
        if type(token) is int:
            continue
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ParameterError("prompt_token_ids", f"must hold integers, got {token!r:.40}")
        found[i] = operator.index(token)
    if not found:
        raise ParameterError("prompt_token_ids", "is empty; give at least one token")
    return found
