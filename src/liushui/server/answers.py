"""What both generating endpoints write around an answer: usage, timings, reasons, errors."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from liushui.core.request import FinishReason
from liushui.engine.outputs import RequestOutput, RequestTimings, StreamDelta
from liushui.server.errors import failed
from liushui.server.house import House, plain_params
from liushui.server.schema.common import Generation
from liushui.server.visit import LOG, Visit

BROKEN = (FinishReason.ABORT, FinishReason.ERROR)
"""Ends that are not told in a chunk: the error follows."""


@dataclass
class Envelope:
    """The fields that all parts of one answer share, and what adds up over them."""

    house: House
    visit: Visit
    body: Generation
    answer_id: str
    kind: str
    """OpenAI's `object`."""
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    held: list[StreamDelta] = field(default_factory=list)
    """Ends that were not told yet."""

    def __call__(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """The answer, or a chunk of it."""
        return {
            "id": self.answer_id,
            "object": self.kind,
            "created": self.created,
            "model": self.house.name,
            "choices": choices,
            "system_fingerprint": self.house.fingerprint,
            **more,
        }

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A chunk of a stream. With usage asked for, OpenAI's chunks have a usage that is null."""
        options = self.body.stream_options
        if options is not None and options.continuous_usage_stats:
            more["usage"] = self.usage()
        elif options is not None and options.include_usage:
            more["usage"] = None
        return self([choice], **more)

    def last_chunk(self, outputs: list[RequestOutput]) -> dict[str, Any] | None:
        """What comes behind all choices, if anything was asked for."""
        options = self.body.stream_options
        more = self.asked_for(outputs)
        if options is not None and options.include_usage:
            more["usage"] = self.usage()
        return self([], **more) if more else None

    def tellable(self, delta: StreamDelta) -> bool:
        """Whether a delta may become a chunk now. An end by deadline with nothing to show waits for the output: where
        there is nothing at all, it becomes a status."""
        if delta.finish_reason is FinishReason.TIMEOUT and not self.completion_tokens and not delta.token_ids:
            self.held.append(delta)
            return False
        return delta.finish_reason not in BROKEN

    def count(self, delta: StreamDelta) -> None:
        self.completion_tokens += len(delta.token_ids)
        self.visit.facts["completion_tokens"] = self.completion_tokens

    def check(self, output: RequestOutput) -> None:
        """Raises `ApiError` if it is no answer."""
        if output.error is not None and not timed_out_with_text(output):
            LOG.warning("unfinished", extra={"facts": {"request_id": self.visit.request_id, "why": output.error}})
            raise failed(output.error_code, None)

    def settle(self, outputs: Iterable[RequestOutput]) -> None:
        """All outputs are there: exact numbers. Raises `ApiError` if one of them is an error."""
        outputs = list(outputs)
        for output in outputs:
            self.check(output)
        self.prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        self.cached_tokens = sum(output.num_cached_tokens for output in outputs)
        self.completion_tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        reasons = {str(answer.finish_reason) for output in outputs for answer in output.outputs}
        self.visit.facts |= {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish": "+".join(sorted(reasons)),
        }
        times = [output.timings for output in outputs if output.timings is not None]
        first = [t.time_to_first_token for t in times if t.time_to_first_token is not None]
        if first:
            self.visit.facts["first_token"] = round(min(first), 6)

    def asked_for(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """`timings` and `effective_params`; of several prompts a list."""
        asked: dict[str, list[Any]] = {}
        if self.visit.timings:
            asked["timings"] = [None if o.timings is None else timings(o.timings) for o in outputs]
        if self.body.return_params:
            asked["effective_params"] = [
                plain_params(o.effective_params) | {"truncated_prompt_tokens": o.truncated_tokens} for o in outputs
            ]
        return {name: values[0] if len(values) == 1 else values for name, values in asked.items()}


def timed_out_with_text(output: RequestOutput) -> bool:
    """Its time was over, and there is something of it: told by the finish reason, with what there is."""
    timed_out = all(answer.finish_reason not in BROKEN for answer in output.outputs)
    return output.error_code == "timeout" and timed_out and any(answer.token_ids for answer in output.outputs)


def timings(found: RequestTimings) -> dict[str, Any]:
    """Seconds, to the microsecond; null for what did not happen."""

    def between(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else round(end - start, 6)

    return {
        "queued": between(found.arrival, found.scheduled),
        "prefill": between(found.scheduled, found.first_token),
        "decode": between(found.first_token, found.last_token),
        "time_to_first_token": between(found.arrival, found.first_token),
        "inter_token": None if found.inter_token is None else round(found.inter_token, 6),
        "total": between(found.arrival, found.finished),
        "preempted": round(found.preempted, 6),
        "preemptions": found.preemptions,
        "steps": found.steps,
        "batch_mates": round(found.mates / found.steps, 3) if found.steps else None,
    }
