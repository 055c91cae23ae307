"""What crosses between the token loop and the text side: values only, of types that every codec knows.

The two may be in one process (`Engine`), on two threads, or in two processes (`wire` makes frames of these).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from liushui.config import EngineConfig, ServingConfig
from liushui.core.plan import TokenLogprobs
from liushui.core.request import FinishReason, Request


class SequenceTimes(NamedTuple):
    """When one answer moved: seconds on the loop's clock, which is the machine's monotonic one."""

    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    preempted: float = 0.0
    """Seconds outside the batch after a preemption."""
    steps: int = 0
    mates: int = 0
    """Other sequences in its steps, summed over the steps."""
    cached_tokens: int = 0


# -- to the loop


@dataclass(frozen=True, slots=True)
class Orders:
    """What the text side wants, in this order: first `submit`, last `close`."""

    submit: tuple[Request, ...] = ()
    finish: tuple[str, ...] = ()
    """Sequences whose stop string is complete."""
    end: tuple[tuple[str, FinishReason], ...] = ()
    """Requests to be ended now."""
    ask: tuple[int, ...] = ()
    """Numbers of questions: who waits, and why? See `Told.views`."""
    close: bool = False


class Setup(NamedTuple):
    """The first message to an engine process."""

    config: EngineConfig
    serving: ServingConfig
    maker: str
    """module:function that makes the `Core` from the two configurations."""
    path: tuple[str, ...]
    """Where Python looks for modules, as in the process that asks."""


# -- from the loop


class Facts(NamedTuple):
    """The first message of a loop: its sizes, or why it has none."""

    num_blocks: int = 0
    block_size: int = 0
    max_model_len: int = 0
    vocab_size: int = 0
    max_num_seqs: int = 0
    report: tuple[str, ...] = ()
    error: str | None = None
    """The model cannot be loaded."""
    error_kind: str = ""
    """Name of the class in `liushui.errors`; "" for anything else."""
    error_field: str = ""


class Tokens(NamedTuple):
    seq_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class PromptLogprobs(NamedTuple):
    seq_id: str
    found: tuple[tuple[int, TokenLogprobs], ...]
    """(position, log-probabilities), in any order; a position may come twice."""


class Ended(NamedTuple):
    seq_id: str
    reason: FinishReason
    times: SequenceTimes
    error: str | None = None


class Step(NamedTuple):
    """One step, in numbers."""

    seconds: float
    num_tokens: int
    sequences: int


class Fullness(NamedTuple):
    """How full it is now, and sums since the start."""

    waiting: int = 0
    running: int = 0
    free_blocks: int = 0
    num_blocks: int = 1
    preemptions: int = 0
    hit_tokens: int = 0
    """Tokens read from the prefix cache instead of computed."""


class View(NamedTuple):
    """One sequence that is there."""

    seq_id: str
    state: str
    why: str
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Told:
    """What happened since the last message. Of one sequence: its tokens, then its end."""

    tokens: list[Tokens] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    """Sequences that entered the batch, for the first time or again."""
    preempted: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    views: list[tuple[int, list[View]]] = field(default_factory=list)
    """Answers to `Orders.ask`: (number, everybody in the order of service)."""
    house: Fullness = field(default_factory=Fullness)
