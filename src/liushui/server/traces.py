"""One span for each request, with what became of its prompts below it. What it says is said elsewhere already: by the
visit, and by the timings that the engine's event log gives to every output. Never the text of a prompt or an answer.

    chat smollm2        |-------------------------------------------|    the visit
      queued            |-----|                                          arrival .. in the batch
      prefill                 |---------|                                .. first token
      decode                            |---------------------------|    .. last token

Names: OpenTelemetry's conventions for generative AI and HTTP servers (opentelemetry.io/docs/specs/semconv, gen-ai and
http); what they have no name for begins with liushui. Times are seconds on the machine's monotonic clock.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from liushui.core.request import FinishReason
from liushui.engine.outputs import RequestOutput, RequestTimings
from liushui.engine.serving import AnswerStream
from liushui.server.visit import Visit

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
"""Path -> gen_ai.operation.name. Other paths leave no spans."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
"""Those that the conventions know: what a client makes up is not told on."""
MAX_PROMPTS = 32
"""Prompts of one request with spans of their own."""
MAX_HEADER = 512
"""Characters of the callers' headers that are read; W3C Trace Context asks for no more."""
_PARAMS = ("temperature", "top_p", "top_k", "max_tokens", "frequency_penalty", "presence_penalty")

Value = str | bool | int | float | Sequence[str]


@dataclass(frozen=True, slots=True)
class Span:
    """What a span will say."""

    name: str
    start: float
    end: float
    attributes: dict[str, Value]
    children: tuple["Span", ...] = ()
    failed: bool = False
    """It went wrong on this side."""


def caller_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, list[str]]:
    """The headers that say whose trace a request belongs to, if they are of a length that makes sense."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name in (b"traceparent", b"tracestate"):
            found.setdefault(name.decode(), []).append(value.decode("latin-1"))
    if len(found.get("traceparent", ())) != 1 or len(found["traceparent"][0]) > MAX_HEADER:
        return {}
    if sum(map(len, found.get("tracestate", ()))) > MAX_HEADER:
        del found["tracestate"]
    return found


def span_of(visit: Visit, end: float) -> Span:
    """The span of a visit that ended at `end`."""
    operation = OPERATIONS[visit.path]
    streams: list[AnswerStream] = visit.streams
    outputs = [stream.output for stream in streams]
    attributes: dict[str, Value | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "liushui",
        "http.request.method": visit.method if visit.method in METHODS else "_OTHER",
        "http.route": visit.path,
        "http.response.status_code": visit.status or None,
        "error.type": visit.code,
        "liushui.request_id": visit.request_id,
        "liushui.key": visit.key.name or None,
        "liushui.prompts": len(streams) or None,
    }
    model = visit.facts.get("model")
    if model is not None:
        attributes |= {"gen_ai.request.model": model}
    if streams:
        attributes |= _asked(streams[0]) | _answered(visit, streams, outputs)
    children: tuple[Span, ...] = ()
    if len(streams) == 1 and outputs[0] is not None:
        attributes |= work(outputs[0])
        children = phases(outputs[0])
    elif streams:
        children = tuple(_prompt(i, output) for i, output in enumerate(outputs[:MAX_PROMPTS]) if output is not None)
        attributes["liushui.prompts_without_span"] = len(streams) - len(children) or None
    broken = visit.code is not None and visit.status == 200  # the status had gone when it happened
    failed = broken or visit.status == 0 or visit.status >= 500
    return Span(f"{operation} {model}" if model else operation, visit.started, end, said(attributes), children, failed)


def _asked(stream: AnswerStream) -> dict[str, Value | None]:
    """The parameters as they are used."""
    params, request = stream.prepared.effective_params(), stream.prepared.request
    asked: dict[str, Value | None] = {f"gen_ai.request.{name}": params[name] for name in _PARAMS}
    asked["gen_ai.request.top_k"] = float(params["top_k"]) if params["top_k"] > 0 else None  # 0: all
    asked["gen_ai.request.seed"] = params["seed"] if params.sources["seed"] == "request" else None
    asked["gen_ai.request.choice.count"] = params["n"] if params["n"] != 1 else None
    asked["gen_ai.request.stream"] = stream.prepared.stream
    return asked | {"gen_ai.output.type": "text", "liushui.priority": request.priority}


def _answered(
    visit: Visit, streams: list[AnswerStream], outputs: Sequence[RequestOutput | None]
) -> dict[str, Value | None]:
    """What came of it, over all prompts."""
    known = [output for output in outputs if output is not None]
    answers = [answer for output in known for answer in output.outputs]
    reasons = [str(answer.finish_reason) for answer in answers if answer.finish_reason is not None]
    return {
        "gen_ai.response.id": visit.facts.get("id"),
        "gen_ai.response.model": visit.facts.get("model"),
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.usage.input_tokens": sum(len(s.prepared.request.prompt_token_ids) for s in streams),
        "gen_ai.usage.output_tokens": sum(len(answer.token_ids) for answer in answers),
        "gen_ai.usage.cache_read.input_tokens": sum(output.num_cached_tokens for output in known),
    }


def _prompt(index: int, output: RequestOutput) -> Span:
    """One of several prompts."""
    parts = phases(output)
    answers = [len(answer.token_ids) for answer in output.outputs]
    attributes: dict[str, Value | None] = {
        "liushui.prompt": index,
        "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.output_tokens": sum(answers),
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
        "gen_ai.response.finish_reasons": [str(answer.finish_reason) for answer in output.outputs],
        "error.type": output.error_code,
    }
    start = output.timings.arrival if output.timings is not None else 0.0
    failed = any(answer.finish_reason is FinishReason.ERROR for answer in output.outputs)
    end = max((part.end for part in parts), default=start)
    return Span("prompt", start, end, said(attributes | work(output)), parts, failed)


def work(output: RequestOutput) -> dict[str, Value | None]:
    """Where the time of one prompt went, in seconds."""
    if (times := output.timings) is None:
        return {}
    return {
        "liushui.queued": times.queued,
        "liushui.prefill": times.prefill,
        "liushui.decode": times.decode,
        "liushui.time_to_first_token": times.time_to_first_token,
        "liushui.inter_token": times.inter_token,
        "liushui.preempted": times.preempted,
        "liushui.preemptions": times.preemptions,
        "liushui.steps": times.steps,
        "liushui.batch_mates": times.batch_mates,
    }


def phases(output: RequestOutput) -> tuple[Span, ...]:
    """Queued, prefill, decode; the one in which it ended early is the last."""
    if (times := output.timings) is None:
        return ()
    found = []
    for name, start, end in _intervals(times):
        last = end if end is not None else times.finished
        if start is not None and last is not None:
            found.append(Span(name, start, max(last, start), {}))
    return tuple(found)


def _intervals(times: RequestTimings) -> list[tuple[str, float | None, float | None]]:
    return [
        ("queued", times.arrival, times.scheduled),
        ("prefill", times.scheduled, times.first_token),
        ("decode", times.first_token, times.last_token),
    ]


def said(attributes: dict[str, Any]) -> dict[str, Value]:
    """Without what is not known."""
    return {name: value for name, value in attributes.items() if value is not None}
