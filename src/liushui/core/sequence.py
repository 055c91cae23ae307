"""`Sequence`: one answer being made. The only mutable state of scheduling."""

from enum import Enum

from liushui.core.blocks import Prefix
from liushui.core.request import FinishReason, Request


class Status(Enum):
    WAITING = "waiting"
    """In the queue: new, or preempted."""
    RUNNING = "running"
    """In the batch."""
    HELD = "held"
    """Ended, but its static group has not: keeps its slot and its news."""
    ENDED = "ended"
    """Gone, but for plans in flight that still name it."""


class Sequence:
    """Answer `index` of a request, as integers.

        0            num_prompt                 num_known           num_total        max_len
        |--- prompt ------|------- answer ----------|---- pending ------|-- to come ----|
        |------------- token_ids: known ------------|-- in flight ------|
        |-------------------- computed -----------------|----- left ----|
        0                                          num_computed
        |-- published --|  whole blocks others may read
        |----- block_table: positions that have a block --------|

    - known: ids on the host, `len(token_ids)`.
    - pending: sampled by plans in flight; how many is known, the ids are not yet.
    - computed: keys and values are written, or will be by plans in flight.
    - left = total - computed: what the next steps feed. 1 in steady decoding, more in a prompt, none once the
      last token that `max_len` allows is pending. The last position fed predicts position `num_total`.
    """

    __slots__ = (
        "admitted_at",
        "arrival",
        "block_table",
        "finish_reason",
        "max_len",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "prefixes",
        "rank",
        "request",
        "seed",
        "seq_id",
        "slot",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: Request, index: int = 0) -> None:
        sampling = request.sampling
        self.request = request
        self.seq_id = request.seq_id(index)
        self.seed = request.seed + index
        eos = frozenset() if sampling.ignore_eos else request.eos_token_ids
        self.stop_token_ids: frozenset[int] = eos.union(sampling.stop_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.max_len = self.num_prompt + request.max_tokens

        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_pending = 0
        self.num_computed = 0
        self.num_in_flight = 0
        """Plans in flight that name it. Until this is 0, its slot and its blocks are not given to others."""
        self.block_table: tuple[int, ...] = ()
        self.num_published = 0
        """Blocks of the table that are published, or equal to a published one."""
        self.prefixes = [Prefix.root(request.cache_salt)]
        """`prefixes[i]`: the prefix of i blocks, as far as it was needed."""

        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.arrival = -1
        """Its number in order of arrival, given by the scheduler."""
        self.rank: tuple[float, int] = (0.0, -1)
        """Its place in the one order of everything, given by the scheduler; see `policy.rank`."""
        self.slot = -1
        """Its place in the batch; -1: none."""
        self.admitted_at: float | None = None
        """When it first entered the batch, seconds on the engine's clock."""
        self.num_cached = 0
        """Prompt tokens that it found in the prefix cache when it first entered."""
        self.num_preemptions = 0

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_total(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_left(self) -> int:
        """Tokens the next steps can feed."""
        total = len(self.token_ids) + self.num_pending
        return total - self.num_computed if total < self.max_len else 0

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def append(self, token_id: int) -> FinishReason | None:
        """Learn the next token; returns the reason if it ends the sequence.

        A stop token ends it once `min_tokens` others stand before it; it counts as a token of the answer.
        """
        self.token_ids.append(token_id)
        num_output = len(self.token_ids) - self.num_prompt
        if token_id in self.stop_token_ids and num_output > self.request.sampling.min_tokens:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.seq_id} {self.status.value} known={self.num_known} pending={self.num_pending} "
            f"computed={self.num_computed} blocks={self.block_table}>"
        )
