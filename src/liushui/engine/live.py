"""`LiveRequest`: a request between its admission and its output, as its user will see it."""

from collections.abc import Sequence

from liushui.core.plan import TokenLogprobs
from liushui.core.request import FinishReason
from liushui.engine.answer import Answer, token_logprob
from liushui.engine.inputs import Prepared
from liushui.engine.loop import describe
from liushui.engine.messages import SequenceTimes
from liushui.engine.outputs import RequestOutput, RequestTimings, TokenLogprob
from liushui.engine.stops import StopAutomaton
from liushui.engine.text import Vocabulary


class LiveAnswer:
    """One sequence of a request: its text, and, when it has left the batch, its times."""

    __slots__ = ("answer", "ended", "request", "seq_id", "times")

    def __init__(self, request: "LiveRequest", seq_id: str, answer: Answer) -> None:
        self.request = request
        self.seq_id = seq_id
        self.answer = answer
        self.times = SequenceTimes()
        self.ended = False
        """It has left the batch; nothing about it is reported any more."""

    def end(self, reason: FinishReason, times: SequenceTimes, error: str | None = None) -> None:
        """Complete the answer. What goes wrong in that is an error of this request."""
        try:
            self.answer.finish(reason)
        except Exception as failure:
            error = f"the text could not be made: {describe(failure)}"
            self.answer.finish(FinishReason.ERROR)
        self.times, self.ended = times, True
        if error is not None and self.request.error is None:
            self.request.error = error


class LiveRequest:
    """All that is known of an accepted request; becomes its `RequestOutput`."""

    def __init__(self, prepared: Prepared, vocab: Vocabulary) -> None:
        request = prepared.request
        self.prepared = prepared
        self.request = request
        self._vocab = vocab
        self.error: str | None = None
        self._prompt_logprobs: dict[int, TokenLogprob] = {}
        stops = StopAutomaton(request.sampling.stop_strings) if request.sampling.stop_strings else None
        self.answers = [
            LiveAnswer(self, request.seq_id(index), Answer(request, index, vocab, stops))
            for index in range(request.sampling.n)
        ]

    @property
    def finished(self) -> bool:
        return all(live.ended for live in self.answers)

    def take_prompt_logprobs(self, seq_id: str, found: Sequence[tuple[int, TokenLogprobs]]) -> None:
        """Every answer computes the same prompt; the first one's count. Recomputed positions come twice."""
        if seq_id == self.answers[0].seq_id:
            for position, logprobs in found:
                if position >= self.request.prompt_logprobs_from:
                    self._prompt_logprobs[position] = token_logprob(self._vocab, logprobs)

    def output(self, finished: float | None) -> RequestOutput:
        """`finished`: when the last answer ended, seconds on the engine's clock."""
        request, prepared = self.request, self.prepared
        wanted = request.sampling.prompt_logprobs is not None
        positions = range(len(request.prompt_token_ids))
        return RequestOutput(
            request_id=request.request_id,
            index=prepared.index,
            prompt=prepared.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[live.answer.output for live in self.answers],
            finished=True,
            prompt_logprobs=[self._prompt_logprobs.get(position) for position in positions] if wanted else None,
            timings=self.timings(finished),
            num_cached_tokens=self.answers[0].times.cached_tokens,  # the others may read what this one computed
            truncated_tokens=prepared.truncated_tokens,
            effective_params=prepared.effective_params(),
            error=self.error,
        )

    def timings(self, finished: float | None) -> RequestTimings:
        times = [live.times for live in self.answers]
        return RequestTimings(
            arrival=self.request.arrival_time,
            scheduled=min((t.scheduled for t in times if t.scheduled is not None), default=None),
            first_token=min((t.first_token for t in times if t.first_token is not None), default=None),
            last_token=max((t.last_token for t in times if t.last_token is not None), default=None),
            finished=finished,
            preemptions=sum(t.preemptions for t in times),
            steps=sum(t.steps for t in times),
            output_tokens=sum(len(live.answer.output.token_ids) for live in self.answers),
            answers=len(self.answers),
            preempted=sum(t.preempted for t in times),
            mates=sum(t.mates for t in times),
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
