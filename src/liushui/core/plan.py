"""Value types that cross between the scheduler, the runner and the engine."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from liushui.core.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """What the runner must know of a sequence once, before its first step."""

    seq_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    """End-of-sequence and stop tokens: not to be chosen before `min_tokens`."""
    prompt_logprobs_from: int = 0
    """First position whose prompt log-probabilities are wanted, if any are."""

    def prompt_rows(self, start: int, count: int) -> range:
        """Of `count` positions fed from `start` on, those that predict a prompt token whose log-probability is wanted
        (position p predicts the token at p + 1)."""
        if self.sampling.prompt_logprobs is None:
            return range(0)
        first = max(start, self.prompt_logprobs_from - 1)
        return range(first, max(first, min(start + count, len(self.prompt_token_ids) - 1)))


class PlanItem(NamedTuple):
    """One sequence's share of a step: positions `start .. start + num_tokens - 1` are fed.

    `token_ids` are the ids known at planning time; if it is one shorter than `num_tokens`, the last id is
    still in flight: the runner feeds the token it sampled for this sequence in the step before.
    """

    seq_id: str
    slot: int
    """The sequence's place in the batch, 0 .. max_num_seqs - 1, stable while it runs."""
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    """KV blocks covering at least positions 0 .. start + num_tokens - 1."""
    samples: bool
    """Whether the last fed position predicts a new token (False inside a prompt's chunks)."""


class StepPlan(NamedTuple):
    """One step of the batch. Items in slot-independent order: decodes first, then prompts, by arrival."""

    step_id: int
    items: tuple[PlanItem, ...]
    new: tuple[NewSequence, ...] = ()
    dropped: tuple[str, ...] = ()
    """Sequences whose runner state may be forgotten before this step (ended since the last plan)."""
    admitted: tuple[tuple[str, int], ...] = ()
    """(seq_id, prompt tokens found in the prefix cache) of those that entered the batch in this plan."""
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of the model itself (before temperature, penalties and truncation)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the k most likely, best first."""


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class StepResult(NamedTuple):
    """What a step gave. `tokens[seq_id]` are the new token ids of each item that samples."""

    tokens: Mapping[str, Seq[int]]
    logprobs: Mapping[str, Seq[TokenLogprobs]] = _NOTHING
    """Parallel to `tokens`, for sequences that asked."""
    prompt_logprobs: Mapping[str, Seq[tuple[int, TokenLogprobs]]] = _NOTHING
    """(position, logprobs of the prompt token at that position), positions >= 1."""
    errors: Mapping[str, str] = _NOTHING
    """Sequences that cannot go on (for example non-finite logits); all others are unharmed."""

    def result(self) -> "StepResult":
        """Itself: a step that is done is a `Pending` too."""
        return self

    @property
    def alone(self) -> bool:
        """It is done."""
        return False


class Pending(Protocol):
    """A step under way."""

    @property
    def alone(self) -> bool:
        """Whether the step is to be read before the next one is launched, which may take long."""
        ...

    def result(self) -> StepResult:
        """Block until the step is done."""
        ...


class Executor(Protocol):
    """Runs plans: on a device, simulated by a cost model, or scripted by a test."""

    def execute(self, plan: StepPlan) -> Pending:
        """Start the step and return at once; plans run in the order given."""
        ...


class TokensEvent(NamedTuple):
    """New tokens of a sequence; stop tokens are included."""

    seq_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A sequence left the batch. Under the static policy this comes when its whole group is done."""

    seq_id: str
    reason: FinishReason
    stop_token_id: int | None = None
    """The end-of-sequence or stop token that ended it, if one did."""


Event = TokensEvent | FinishedEvent
