"""`Answer`: one sequence's tokens on their way to the user: text, stop strings, log-probabilities."""

from bisect import bisect_right
from collections.abc import Sequence

from liushui.core.plan import TokenLogprobs
from liushui.core.request import FinishReason, Request
from liushui.engine.outputs import CompletionOutput, Logprob, StreamDelta, TokenLogprob
from liushui.engine.stops import StopAutomaton, StopScanner
from liushui.engine.text import Vocabulary


class Answer:
    """Answer `index` of a request.

    Tokens are taken one by one, so that what is shown cannot depend on how many arrived together. The token that
    ends the answer (end-of-sequence or stop id) stays in `token_ids` and out of the text, unless
    `include_stop_str_in_output`; a token that completes a stop string is the last one kept.
    """

    def __init__(self, request: Request, index: int, vocab: Vocabulary, stops: StopAutomaton | None = None) -> None:
        params = request.sampling
        self.request = request
        self._vocab = vocab
        self._eos = frozenset() if params.ignore_eos else request.eos_token_ids
        self._ends = self._eos.union(params.stop_token_ids)
        self._stream = vocab.stream(skip_special_tokens=params.skip_special_tokens, prompt_ids=request.prompt_token_ids)
        include = params.include_stop_str_in_output
        self._scanner = StopScanner(stops, include=include) if stops is not None else None
        self._texts: list[str] = []
        self._text_ends: list[int] = []
        """Tokens that were there when each of `_texts` could be shown."""
        self._sent_texts = self._sent_tokens = 0
        self.output = CompletionOutput(index, "", [])
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self.closed = False
        """Takes no more tokens: ended, or a stop string is complete. Tokens still in flight are discarded."""

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> bool:
        """Take the next tokens, up to one that completes a stop string; then True: the sequence must be ended."""
        return any(self.push(token, logprobs[i] if i < len(logprobs) else None) for i, token in enumerate(token_ids))

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> bool:
        """Take the next token. Returns True if it completed a stop string, so that the sequence must be ended."""
        output, params = self.output, self.request.sampling
        output.token_ids.append(token_id)
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(token_logprob(self._vocab, logprobs))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs.logprob
        count = len(output.token_ids)
        if token_id in self._ends and count > params.min_tokens:
            output.stop_reason = None if token_id in self._eos else token_id
            self.closed = True
            if params.include_stop_str_in_output:
                self._show(self._stream.push(token_id), armed=True)
            return False
        return self._show(self._stream.push(token_id), armed=count > params.min_tokens)

    def finish(self, reason: FinishReason) -> None:
        """The sequence has left the batch: flush what was held back. After an error, which may be the text's own,
        half characters are dropped."""
        output, scanner = self.output, self._scanner
        if reason is not FinishReason.ERROR and (scanner is None or scanner.matched is None):
            self._show(self._stream.flush(), armed=len(output.token_ids) > self.request.sampling.min_tokens)
        if scanner is not None and scanner.matched is None:
            self._add(scanner.flush())
        elif scanner is not None and reason in (FinishReason.STOP, FinishReason.LENGTH):
            reason, output.stop_reason = FinishReason.STOP, scanner.matched
        if reason is not FinishReason.STOP:
            output.stop_reason = None
        output.text = "".join(self._texts)
        output.finish_reason = reason
        self.closed = True

    @property
    def unsent(self) -> bool:
        """Whether `delta` has more to give, its end aside."""
        return self._sent_tokens < len(self.output.token_ids) or self._sent_texts < len(self._texts)

    def delta(self, index: int, error: str | None = None, most: int | None = None) -> StreamDelta:
        """What came since the last call, or the first `most` tokens of it and their text: then the rest, and with it
        the end, is for later calls. `index`: the request's position in the input."""
        output, start = self.output, self._sent_tokens
        known = len(output.token_ids)
        end = known if most is None else min(known, start + most)
        texts = len(self._texts) if end == known else bisect_right(self._text_ends, end, self._sent_texts)
        text = "".join(self._texts[self._sent_texts : texts])
        self._sent_texts, self._sent_tokens = texts, end
        reason = output.finish_reason if end == known else None
        return StreamDelta(
            self.request.request_id,
            index,
            output.index,
            text,
            tuple(output.token_ids[start:end]),
            None if output.logprobs is None else tuple(output.logprobs[start:end]),
            reason,
            output.stop_reason if reason is not None else None,
            error if reason is not None else None,
        )

    def _add(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self._text_ends.append(len(self.output.token_ids))

    def _show(self, text: str, armed: bool) -> bool:
        if self._scanner is None:
            self._add(text)
            return False
        self._add(self._scanner.feed(text, armed=armed))
        self.closed = self.closed or self._scanner.matched is not None
        return self._scanner.matched is not None


def token_logprob(vocab: Vocabulary, found: TokenLogprobs) -> TokenLogprob:
    """vLLM's shape: the chosen token, then the most likely ones."""
    entry = {found.token_id: Logprob(found.logprob, found.rank, vocab.token_text(found.token_id))}
    for rank, (token_id, logprob) in enumerate(found.top, start=1):
        entry.setdefault(token_id, Logprob(logprob, rank, vocab.token_text(token_id)))
    return entry
