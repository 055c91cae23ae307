"""Spans to an OpenTelemetry collector, by OTLP over HTTP. Imported only where they are asked for.

    end of a visit -> spans -> bounded queue ====> a thread of the SDK: batches, retries ====> collector

The event loop never waits for any of it. A collector that is slow or gone costs spans, which are counted, and nothing
else. Sampling, headers, certificates, batch sizes and delays are the SDK's, by its `OTEL_*` variables.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from liushui import __version__
from liushui.errors import ParameterError
from liushui.server.traces import OPERATIONS, Span, span_of
from liushui.server.visit import LOG, Visit

MAX_QUEUE = 4096
"""Spans that wait for the collector or are on their way to it."""
PATIENCE = 1.0
"""Seconds a span waits for the engine to end what its client has left."""
QUIET = 60.0
"""Seconds between two lines of log about lost spans."""


class Counted(SpanExporter):
    """An exporter that knows what came of its spans."""

    def __init__(self, exporter: SpanExporter, lost: Callable[[], None]) -> None:
        self._exporter = exporter
        self._lost = lost
        self.sent = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                self.sent += len(spans)
            else:
                self.failed += len(spans)
                self._lost()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Bounded(SpanProcessor):
    """In front of the SDK's queue, which drops without counting."""

    def __init__(self, inner: SpanProcessor, exporter: Counted, lost: Callable[[], None], limit: int) -> None:
        self._inner = inner
        self._exporter = exporter
        self._lost = lost
        self._limit = limit
        self.taken = 0
        self.dropped = 0

    @property
    def unsent(self) -> int:
        return self.taken - self._exporter.sent - self._exporter.failed

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self.unsent >= self._limit:
            self.dropped += 1
            self._lost()
            return
        self.taken += 1
        self._inner.on_end(span)

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


class Traces:
    """Makes the spans of visits that have ended, and sends them. For one event loop."""

    def __init__(self, exporter: SpanExporter, *, max_queue: int = MAX_QUEUE) -> None:
        self._exporter = Counted(exporter, self._lost)
        batches = BatchSpanProcessor(self._exporter, max_queue_size=max_queue)
        self._queue = Bounded(batches, self._exporter, self._lost, max_queue)
        # Neither global nor ended at exit: whoever else uses OpenTelemetry here is not disturbed, nor the exit held up.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(self._queue)
        self._tracer: Tracer = self._provider.get_tracer("liushui", __version__)
        self._callers = TraceContextTextMapPropagator()
        self._late: dict[int, Callable[[], None]] = {}
        """Visits that have ended before the engine has."""
        self._said = float("-inf")

    @classmethod
    def to(cls, endpoint: str) -> "Traces":
        """To a collector, in the background. `endpoint`: `ServerConfig.traces_url`. Raises `ParameterError`."""
        log = logging.getLogger("opentelemetry")
        log.handlers[:] = LOG.handlers
        log.propagate = False
        log.setLevel(logging.ERROR)  # callers' headers that make no sense are not worth a line
        try:
            return cls(OTLPSpanExporter(endpoint=endpoint))
        except Exception as error:
            what = f"OpenTelemetry refuses its settings ({error}); see the OTEL_* variables of the environment"
            raise ParameterError("otlp_traces_endpoint", what) from None

    def counts(self) -> dict[str, int]:
        """Spans by what came of them: sent, failed (the collector did not take them), dropped (the queue was full)."""
        return {"sent": self._exporter.sent, "failed": self._exporter.failed, "dropped": self._queue.dropped}

    def ended(self, visit: Visit) -> None:
        """A visit is over. What the engine still does for it is waited for, a little."""
        if visit.path not in OPERATIONS or visit.caller is None:
            return
        end = time.monotonic()
        if all(stream.output is not None for stream in visit.streams):
            self._send(visit, end)
            return

        def send() -> None:
            self._late.pop(id(visit), None)
            timer.cancel()
            self._send(visit, end)

        self._late[id(visit)] = send
        timer = asyncio.get_running_loop().call_later(PATIENCE, send)

    async def close(self, seconds: float) -> None:
        """Send what is left, for at most so many seconds."""
        for send in list(self._late.values()):
            send()
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="last-spans", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), seconds)
        counts = self.counts() | {"unsent": self._queue.unsent}
        level = logging.WARNING if counts["sent"] < sum(counts.values()) else logging.INFO
        LOG.log(level, "traces", extra=_facts(counts))

    def _send(self, visit: Visit, end: float) -> None:
        """No request may fail for its span."""
        try:
            context = self._callers.extract(visit.caller or {}, Context())
            self._make(span_of(visit, end), context, SpanKind.SERVER, time.time() - time.monotonic())
        except Exception:
            LOG.exception("no_span", extra=_facts({"request_id": visit.request_id}))

    def _make(self, found: Span, context: Context, kind: SpanKind, epoch: float) -> None:
        """`epoch`: Unix time at zero of the monotonic clock."""

        def at(seconds: float) -> int:
            return int((seconds + epoch) * 1e9)

        span = self._tracer.start_span(
            found.name, context, kind, attributes=found.attributes, start_time=at(found.start)
        )
        if found.failed:
            span.set_status(Status(StatusCode.ERROR))
        for child in found.children:
            self._make(child, set_span_in_context(span, context), SpanKind.INTERNAL, epoch)
        span.end(at(found.end))

    def _lost(self) -> None:
        now = time.monotonic()
        if now - self._said >= QUIET:
            self._said = now
            LOG.warning("spans_lost", extra=_facts(self.counts()))


def _facts(facts: Mapping[str, object]) -> dict[str, object]:
    return {"facts": facts}


def _resource() -> Resource:
    """The SDK's, from its variables; without a name of its own the service is called liushui."""
    found = Resource.create({"service.version": __version__})
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: "liushui"}))
    return found
