"""What comes back: results, stream deltas, timings. Names and shapes as in vLLM where it has them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from liushui.core.request import FinishReason

Source = Literal["request", "generation_config", "default", "drawn", "fitted"]
"""Where a parameter comes from: named by the request, suggested by the model's files, the default of `SamplingParams`
(or of the command), drawn by the engine (a seed), or as much as fits (max_tokens None)."""


class EffectiveParams(dict[str, Any]):
    """Sampling parameter -> the value that was used; `sources`: parameter -> where that came from."""

    def __init__(
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), sources: Mapping[str, Source] | None = None
    ) -> None:
        super().__init__(values)
        self.sources: dict[str, Source] = dict(sources or {})

    def explained(self) -> dict[str, dict[str, Any]]:
        """{"temperature": {"value": 0.6, "source": "generation_config"}, ...}."""
        return {name: {"value": value, "source": self.sources.get(name)} for name, value in self.items()}


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural-log probability under the model itself (before temperature, penalties, truncation)."""

    logprob: float
    rank: int
    """1 is the most likely."""
    decoded_token: str


TokenLogprob = dict[int, Logprob]
"""Token id -> its log-probability: the chosen token first, then the k most likely, best first."""


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """When it happened, in seconds on the engine's (monotonic) clock. None: did not happen."""

    arrival: float
    scheduled: float | None = None
    """It entered the batch for the first time."""
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    """It left the batch: under the static policy, when its whole group was done."""
    preemptions: int = 0
    steps: int = 0
    """Steps that advanced it (an answer's share each, if n > 1)."""
    output_tokens: int = 0
    """Of all its answers together."""
    answers: int = 1
    preempted: float = 0.0
    """Seconds that its answers waited, together, after giving up their KV blocks to others."""
    mates: int = 0
    """Other sequences in its steps, summed over the steps."""

    @property
    def queued(self) -> float | None:
        """Seconds from arrival to the batch."""
        return None if self.scheduled is None else self.scheduled - self.arrival

    @property
    def prefill(self) -> float | None:
        """Seconds from the batch to the first token."""
        return None if self.first_token is None or self.scheduled is None else self.first_token - self.scheduled

    @property
    def decode(self) -> float | None:
        """Seconds from the first token to the last."""
        return None if self.first_token is None or self.last_token is None else self.last_token - self.first_token

    @property
    def batch_mates(self) -> float:
        """Mean number of other sequences in the steps that advanced it."""
        return self.mates / self.steps if self.steps else 0.0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def total(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival

    @property
    def inter_token(self) -> float | None:
        """Mean seconds between two tokens of an answer after the first; None with fewer than two tokens each."""
        gaps = self.output_tokens - self.answers
        if self.first_token is None or self.last_token is None or gaps < 1:
            return None
        return (self.last_token - self.first_token) * self.answers / gaps


@dataclass(slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    """Which of the n answers, 0 .. n - 1."""
    text: str
    token_ids: list[int]
    """All tokens, the one that ended the answer included."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence and all other reasons."""
    logprobs: list[TokenLogprob] | None = None
    """One per token, if asked."""
    cumulative_logprob: float | None = None
    """Sum over the chosen tokens, if logprobs were asked."""


@dataclass(slots=True)
class RequestOutput:
    """Everything about one finished request."""

    request_id: str
    index: int
    """Position in the input of `generate`."""
    prompt: str | None
    """The text given; None if token ids were given."""
    prompt_token_ids: list[int]
    """What the model was fed, after truncation."""
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One per prompt token, if asked; None for the first, which nothing predicts."""
    timings: RequestTimings | None = None
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    truncated_tokens: int = 0
    """Prompt tokens cut off by truncate_prompt_tokens."""
    effective_params: EffectiveParams = field(default_factory=EffectiveParams)
    """Every sampling parameter as it was used, drawn seed and resolved max_tokens included; `.sources` says where each
    came from."""
    error: str | None = None
    """Why it was refused or could not go on; the other fields hold what there is."""
    error_code: str | None = None
    """The same for a program, when served: aborted, timeout, engine_died, model_error."""


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """New text of one answer. The texts of an answer's deltas concatenate to `CompletionOutput.text`, the token
    ids to its `token_ids`; text may come later than its tokens (half a character, the beginning of a stop)."""

    request_id: str
    index: int
    """Position of the request in the input."""
    output_index: int
    """Which of the n answers."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Parallel to `token_ids`, if asked."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of the answer."""
    stop_reason: str | int | None = None
    error: str | None = None
    """Set if `finish_reason` is "error"."""
