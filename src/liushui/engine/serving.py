"""The engine as a server sees it: an asyncio face, and the words that cross it.

    engine = InProcessEngine.load(config)           # or ProcessEngine: the same face, the loop in a process of its own
    await engine.start()
    async with await engine.submit(ServeRequest(prompt_token_ids=ids, stream=True)) as answers:
        async for news in answers:                  # StreamDelta ..., then exactly one RequestOutput, the last
            ...

Text is made on this side of the face, tokens on the other: HTTP, JSON and detokenisation never share the loop's
interpreter lock with it. All methods are for one event loop; none of them blocks it.
"""

from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from liushui.core.request import SamplingParams
from liushui.engine.inputs import Limits, Prepared
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.tokenizer import Tokenizer

News = StreamDelta | RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """One prompt to answer. `n`, `truncate_prompt_tokens`, `prompt_logprobs`, `stop` ... are in `params`."""

    prompt_token_ids: Seq[int]
    prompt: str | None = None
    """The text the ids were made from, if it was text: reported back, and lets a truncation on the left keep BOS."""
    params: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False
    """Deltas besides the final output. Without it nothing comes before the final `RequestOutput`."""
    request_id: str | None = None
    """Unique among the unfinished, without "/". None: the engine chooses."""
    index: int = 0
    """Position in the caller's list of prompts; handed back on every delta and output."""
    priority: int = 0
    """Lower is served first. Waiting raises it: nobody starves."""
    tenant: str = ""
    """The name of the API key. Tenants share the engine fairly, and no prefix cache."""
    cache_salt: str = ""
    """Shares cached prefixes only with requests of the same tenant and the same salt."""
    timeout: float | None = None
    """Seconds until it must have ended; then it ends with `FinishReason.TIMEOUT` and what there is of it.
    None: `ServingConfig.timeout`."""


class AnswerStream(Protocol):
    """What comes of one request. Leaving it early (`aclose`, `async with`, cancelled while waiting) aborts the request:
    its KV blocks are free after the step in flight. A reader that is slow gets fewer and longer deltas (bounded
    each, see `ticket`), and holds up nobody: what it has not read is kept once, as the answer itself."""

    @property
    def request_id(self) -> str: ...

    @property
    def prepared(self) -> Prepared:
        """The request as it is run: prompt ids after truncation, `truncated_tokens`, `effective_params()`."""
        ...

    @property
    def output(self) -> RequestOutput | None:
        """What it has ended in, as soon as it has; also if its reader has left."""
        ...

    def __aiter__(self) -> AsyncIterator[News]: ...

    async def __anext__(self) -> News: ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> "AnswerStream": ...

    async def __aexit__(self, *error: object) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What stays fixed while the engine is up."""

    model: str
    """As it was asked for: alias, Hugging Face name, folder or file."""
    served_names: tuple[str, ...]
    """Names clients may use; the first is the one reported."""
    limits: Limits
    """`max_model_len`, `kv_tokens`, `vocab_size`; `longest` is what a prompt and its answer must fit in."""
    max_num_seqs: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    """Whether `tokenizer.encode` puts BOS in front."""
    chat_template_hash: str | None
    """None: no chat template, so no chat."""
    report: tuple[str, ...] = ()
    """The start-up report, one fact a line."""


class Readiness(NamedTuple):
    ready: bool
    why: str
    """For a person; "" if ready."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in buckets, as Prometheus counts them but not cumulative."""

    bounds: tuple[float, ...]
    """Upper bounds, ascending; above the last is one more bucket."""
    counts: tuple[int, ...]
    """`len(bounds) + 1` of them."""
    total: float
    """Sum of all observations."""

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Gauges:
    """Now. Sequences: a request with n answers counts n times, once it is accepted."""

    waiting: int = 0
    waiting_tokens: int = 0
    """Tokens to compute before those who wait have their first one."""
    running: int = 0
    kv_usage: float = 0.0
    """Share of the KV blocks that somebody owns, 0 .. 1; cached ones that nobody owns are free."""
    unfinished_requests: int = 0
    output_tokens_per_second: float = 0.0
    """Measured over the last seconds."""
    retry_after: float = 0.0
    """Seconds a refused request would be told to wait now, from the measured rate."""


@dataclass(frozen=True, slots=True)
class Stats:
    """For /metrics. `counters` only grow, also over a restart of the engine process."""

    gauges: Gauges
    counters: Mapping[str, int]
    """requests, prompt_tokens, output_tokens, cached_tokens, preemptions, steps, wasted_tokens (generated after the
    end of their answer was decided), engine_restarts, retried_requests."""
    finished: Mapping[str, int]
    """Answers by finish reason: stop, length, abort, timeout, error."""
    refused: Mapping[str, int]
    """Requests refused with `Overloaded`, by reason."""
    histograms: Mapping[str, Histogram]
    """Seconds: time_to_first_token, inter_token, queue, prefill, decode, request, step. Tokens: step_tokens,
    prompt_tokens, answer_tokens."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """One unfinished answer, for /debug/requests. No text: it is somebody's."""

    request_id: str
    tenant: str
    state: str
    """waiting, preempted or running."""
    why: str
    """Why it waits, or what it does; for a person."""
    prompt_tokens: int
    output_tokens: int
    priority: int
    age: float
    """Seconds since its arrival."""
    time_left: float | None
    """Seconds to its deadline."""


class ServingEngine(Protocol):
    """An engine behind a server."""

    @property
    def info(self) -> EngineInfo:
        """Raises `RuntimeError` before `start` is done."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """In this process: tokenize, detokenize, chat template. `encode` of a long text takes a while: use a thread
        (it releases the interpreter lock)."""
        ...

    async def start(self) -> None:
        """Load the model. Raises `ModelError`, `ParameterError`."""
        ...

    async def submit(self, request: ServeRequest) -> AnswerStream:
        """Accept, or refuse at once: `ParameterError` (its subclass `CapacityError` for what can never fit): 400 with
        `.field`; `Overloaded`: 503 with `.retry_after` seconds and `.reason`. Accepted, it ends in exactly one
        `RequestOutput`, whatever happens. If it went wrong, `RequestOutput.error` says so to a person and
        `.error_code` to a program: aborted, timeout, engine_died (500, may be sent again), model_error."""
        ...

    def check_room(self, num_tokens: int = 1) -> None:
        """Raises `Overloaded` if a request of so many prompt tokens would be refused now: before they are counted."""
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request now, from anywhere; its stream gets its `RequestOutput`. False: unknown, or ended before."""
        ...

    def stats(self) -> Stats: ...

    async def requests(self) -> list[RequestView]:
        """Who waits and why, who runs; in the order of service."""
        ...

    def ready(self) -> Readiness:
        """Whether a request sent now would be served: loaded, not draining, and the loop makes progress."""
        ...

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse what is new, finish the rest; returns when idle. After `timeout` seconds what is left is aborted, and
        the answer is False."""
        ...

    async def close(self) -> None:
        """Abort everything and stop. May be called twice."""
        ...


def effective_timeout(asked: float | None, default: float | None) -> float | None:
    """Seconds: the request's own, never longer than the server's."""
    given = [seconds for seconds in (asked, default) if seconds is not None]
    return min(given, default=None)


def salt(tenant: str, cache_salt: str) -> str:
    """The salt of the prefix cache: no two (tenant, salt) share one."""
    return f"{len(tenant)}:{tenant}:{cache_salt}" if tenant or cache_salt else ""
