"""What the runner remembers of a sequence between steps."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from liushui.core.plan import NewSequence


class SequenceState:
    """Sampling state of one sequence; survives preemption."""

    __slots__ = ("_plain", "_stops_from", "counts", "last_token", "new", "num_generated", "prompt_ids")

    def __init__(self, new: NewSequence) -> None:
        self.new = new
        self.last_token = -1
        self.num_generated = 0
        s = new.sampling
        penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        self.counts: Counter[int] | None = Counter() if penalised else None
        self.prompt_ids = np.unique(np.array(new.prompt_token_ids, np.int64)) if s.repetition_penalty != 1 else None

        self._stops_from = s.min_tokens if new.stop_token_ids else 0
        self._plain = s.greedy and s.logprobs is None and not penalised and not s.logit_bias

    @property
    def wants_most_likely(self) -> bool:
        """Whether the most likely token is all that is wanted of a row."""
        return self._plain and self.num_generated >= self._stops_from

    def append(self, token: int) -> None:
        self.last_token = token
        self.num_generated += 1
        if self.counts is not None:
            self.counts[token] += 1

    def seen(self) -> np.ndarray:
        """Token ids of prompt and output, for the repetition penalty."""
        generated = np.fromiter(self.counts or (), np.int64)
        return generated if self.prompt_ids is None else np.union1d(self.prompt_ids, generated)

    def generated(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, counts) of the output, for the presence and frequency penalties."""
        counts: Mapping[int, int] = self.counts or {}
        return np.fromiter(counts.keys(), np.int64), np.fromiter(counts.values(), np.float32)

    @property
    def adjusts_logits(self) -> bool:
        s = self.new.sampling
        return self.counts is not None or bool(s.logit_bias) or self.bans_stops

    @property
    def truncates(self) -> bool:
        """Whether only some of the most likely tokens may be drawn."""
        s = self.new.sampling
        return not s.greedy and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)

    @property
    def bans_stops(self) -> bool:
        return self.num_generated < self._stops_from
