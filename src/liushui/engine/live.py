"""`LiveRequest`: a request between its admission and its output."""

from liushui.core.plan import TokenLogprobs
from liushui.core.sequence import Sequence
from liushui.engine.answer import Answer, prompt_logprobs
from liushui.engine.inputs import Prepared
from liushui.engine.outputs import RequestOutput, RequestTimings
from liushui.engine.stops import StopAutomaton
from liushui.engine.text import Vocabulary


class LiveAnswer:
    """One sequence of a request: the scheduler's side, the user's side, and when it moved."""

    __slots__ = ("answer", "ended", "first_token", "last_step", "last_token", "request", "sequence", "steps")

    def __init__(self, request: "LiveRequest", sequence: Sequence, answer: Answer) -> None:
        self.request = request
        self.sequence = sequence
        self.answer = answer
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.steps = 0
        self.last_step = -1
        """The last step that advanced it."""
        self.ended = False
        """It has left the batch; nothing about it is reported any more."""


class LiveRequest:
    """All that is known of an accepted request; becomes its `RequestOutput`."""

    def __init__(self, prepared: Prepared, vocab: Vocabulary) -> None:
        request = prepared.request
        self.prepared = prepared
        self.request = request
        self._vocab = vocab
        self.error: str | None = None
        self._prompt_logprobs: dict[int, TokenLogprobs] = {}
        stops = StopAutomaton(request.sampling.stop_strings) if request.sampling.stop_strings else None
        self.answers = [
            LiveAnswer(self, Sequence(request, index), Answer(request, index, vocab, stops))
            for index in range(request.sampling.n)
        ]

    @property
    def finished(self) -> bool:
        return all(live.ended for live in self.answers)

    def take_prompt_logprobs(self, seq_id: str, found: "list[tuple[int, TokenLogprobs]]") -> None:
        """Every answer computes the same prompt; the first one's count. Recomputed positions come twice."""
        if seq_id == self.answers[0].sequence.seq_id:
            self._prompt_logprobs.update(found)

    def output(self, finished: float) -> RequestOutput:
        """`finished`: when the last answer ended, seconds on the engine's clock."""
        request, prepared = self.request, self.prepared
        wanted = request.sampling.prompt_logprobs is not None
        num_prompt = len(request.prompt_token_ids)
        return RequestOutput(
            request_id=request.request_id,
            index=prepared.index,
            prompt=prepared.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[live.answer.output for live in self.answers],
            finished=True,
            prompt_logprobs=(
                prompt_logprobs(
                    self._vocab,
                    num_prompt,
                    [item for item in self._prompt_logprobs.items() if item[0] >= request.prompt_logprobs_from],
                )
                if wanted
                else None
            ),
            timings=self.timings(finished),
            num_cached_tokens=max(live.sequence.num_cached for live in self.answers),
            truncated_tokens=prepared.truncated_tokens,
            effective_params=prepared.effective_params(),
            error=self.error,
        )

    def timings(self, finished: float | None) -> RequestTimings:
        admitted = [a.sequence.admitted_at for a in self.answers if a.sequence.admitted_at is not None]
        first = [live.first_token for live in self.answers if live.first_token is not None]
        last = [live.last_token for live in self.answers if live.last_token is not None]
        return RequestTimings(
            arrival=self.request.arrival_time,
            scheduled=min(admitted, default=None),
            first_token=min(first, default=None),
            last_token=max(last, default=None),
            finished=finished,
            preemptions=sum(live.sequence.num_preemptions for live in self.answers),
            steps=sum(live.steps for live in self.answers),
            output_tokens=sum(len(live.answer.output.token_ids) for live in self.answers),
            answers=len(self.answers),
        )


def refused(error: Exception, *, request_id: str, index: int, prompt: object) -> RequestOutput:
    """The output of a request that was never accepted."""
    return RequestOutput(
        request_id=request_id,
        index=index,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[],
        outputs=[],
        error=str(error) or type(error).__name__,
    )
