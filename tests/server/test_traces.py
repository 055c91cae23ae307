"""OpenTelemetry: what a span says, whose trace it is part of, and that nothing waits for a collector."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from liushui.cli.serve import SERVER
from liushui.errors import LiushuiError, ParameterError
from liushui.server.keys import KeyRing
from liushui.server.settings import ServerConfig
from liushui.server.traces import MAX_HEADER, MAX_PROMPTS, caller_of
from liushui.server.visit import LOG
from tests.engine.scripted import ScriptedExecutor
from tests.support.serving import Running, running, scripted

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from liushui.server.otlp import Traces

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = "sk-of-alice-0123456789"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


class Traced:
    """A server and the spans it leaves."""

    def __init__(self, server: Running, traces: Traces, exporter: InMemorySpanExporter) -> None:
        self.server = server
        self._traces = traces
        self._exporter = exporter

    def spans(self, count: int) -> list[Any]:
        """The spans since the last time, when there are so many; the first is that of the request."""

        def there() -> bool:
            return self._traces._provider.force_flush() and len(self._exporter.get_finished_spans()) >= count

        until(there)
        found = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return [span for span in found if span.kind is SpanKind.SERVER] + [
            span for span in found if span.kind is not SpanKind.SERVER
        ]


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter)
    with running(scripted(), traces=traces) as server:
        yield Traced(server, traces, exporter)


def test_a_request_is_one_span_with_its_phases(traced: Traced) -> None:
    before = time.time_ns()
    answer = traced.server.chat(
        "a word to look for",
        max_tokens=6,
        temperature=0.5,
        seed=3,
        priority=4,
        ignore_eos=True,
        stop=["unheard of"],
        user="somebody",
        return_timings=True,
    )
    spans = traced.spans(4)
    root, *phases = spans
    assert root.name == "chat tiny"
    assert root.parent is None
    usage, timings, found = answer.json()["usage"], answer.json()["timings"], dict(root.attributes)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "liushui",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "liushui.request_id": answer.headers["x-request-id"],
        "liushui.priority": 4,
        "liushui.steps": timings["steps"],
        "liushui.preemptions": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    for name in ("queued", "prefill", "decode", "time_to_first_token"):
        assert found[f"liushui.{name}"] == pytest.approx(timings[name], abs=2e-6)
    assert [phase.name for phase in phases] == ["queued", "prefill", "decode"]
    assert all(phase.parent.span_id == root.context.span_id for phase in phases)
    assert before <= root.start_time <= phases[0].start_time
    assert [phases[i].end_time == phases[i + 1].start_time for i in (0, 1)] == [True, True]
    assert phases[-1].end_time <= root.end_time <= time.time_ns()
    assert root.status.status_code is StatusCode.UNSET
    assert root.resource.attributes["service.name"] == "liushui"
    told = "".join(span.to_json() for span in spans)
    assert not any(word in told for word in ("look for", "unheard", "somebody"))


def test_several_prompts_are_spans_of_their_own(traced: Traced) -> None:
    answer = traced.server.complete(["ab", "abc"], max_tokens=2, n=2, ignore_eos=True, stream=True)
    root, *below = traced.spans(9)
    assert root.name == "text_completion tiny"
    assert root.attributes["gen_ai.response.id"] in answer.text
    assert root.attributes["gen_ai.request.choice.count"] == 2
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",) * 4
    prompts = [span for span in below if span.name == "prompt"]
    assert sorted(span.attributes["liushui.prompt"] for span in prompts) == [0, 1]
    ids = {span.context.span_id for span in prompts}
    assert {span.parent.span_id for span in below if span.name != "prompt"} == ids
    assert {span.parent.span_id for span in prompts} == {root.context.span_id}
    many = MAX_PROMPTS + 3
    traced.server.complete([[i % 9] for i in range(many)], max_tokens=1, ignore_eos=True)
    root, *below = traced.spans(1 + 4 * MAX_PROMPTS)
    assert (root.attributes["liushui.prompts"], root.attributes["liushui.prompts_without_span"]) == (many, 3)
    assert sum(span.name == "prompt" for span in below) == MAX_PROMPTS


def test_the_callers_trace_goes_on(traced: Traced) -> None:
    given_state = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    traced.server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=given_state)
    root, *phases = traced.spans(4)
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"
    assert {phase.context.trace_id for phase in phases} == {root.context.trace_id}
    # Not sampled by the caller: not by us.
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    traced.server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=unsampled)
    traced.server.complete("a", max_tokens=1)
    assert f"{traced.spans(4)[0].context.trace_id:032x}" != TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        "hello",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"cc-{TRACE}-{PARENT}-01-" + "9" * 600,
        "00-" + "9" * 10_000,
    ],
)
def test_a_header_that_makes_no_sense_begins_a_trace(traced: Traced, value: str) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    response = traced.server.post("/v1/completions", body, headers={"traceparent": value, "tracestate": value})
    assert response.status_code == 200
    root = traced.spans(4)[0]
    assert root.parent is None
    assert root.context.trace_id != int(TRACE, 16)


header = st.text(st.characters(max_codepoint=255), max_size=600).map(lambda text: text.encode("latin-1"))


@given(st.lists(st.tuples(st.sampled_from([b"traceparent", b"tracestate", b"host"]), header), max_size=4))
@example([(b"traceparent", b"00-" + TRACE.encode() + b"-" + PARENT.encode() + b"-01")] * 2)
@example([(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode()), (b"tracestate", b"a=b," * 200)])
def test_headers_are_bounded_and_never_raise(headers: list[tuple[bytes, bytes]]) -> None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found = caller_of(headers)
    assert sum(len(text) for texts in found.values() for text in texts) <= 2 * MAX_HEADER
    assert len(found.get("traceparent", ["one"])) == 1
    TraceContextTextMapPropagator().extract(found)


def test_what_is_refused_says_why(traced: Traced) -> None:
    response = traced.server.complete("a", temperature=-1)
    (root,) = traced.spans(1)
    assert root.attributes["error.type"] == response.json()["error"]["code"] == "invalid_value"
    assert root.attributes["http.response.status_code"] == 400
    assert root.status.status_code is StatusCode.UNSET  # it is the client's error
    assert "gen_ai.usage.input_tokens" not in root.attributes
    traced.server.complete("a", model="another")
    (root,) = traced.spans(1)
    assert (root.name, root.attributes["error.type"]) == ("text_completion", "model_not_found")


def test_a_method_that_is_made_up(traced: Traced) -> None:
    traced.server.client.request("X" * 3000, "/v1/completions")
    (root,) = traced.spans(1)
    assert root.attributes["http.request.method"] == "_OTHER"
    assert root.attributes["error.type"] == "method_not_allowed"
    assert "XX" not in root.to_json()


def test_only_generating_leaves_spans(traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/nowhere"):
        traced.server.client.get(path)
    traced.server.post("/tokenize", {"prompt": "abc"})
    traced.server.complete("a", max_tokens=1)
    assert traced.spans(4)[0].name == "text_completion tiny"


def test_nobody_without_a_key_leaves_spans() -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter)
    keys = KeyRing.load(ServerConfig(api_key=(KEY,)))
    with running(scripted(), keys, traces) as server:
        assert server.complete("a").status_code == 401
        assert server.complete("a", max_tokens=1, n=2).status_code == 401
        answer = server.post("/v1/completions", {"prompt": "a"}, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
    assert [span.name for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER] == [
        "text_completion tiny"
    ]


def test_a_client_that_leaves_is_seen_with_its_phases() -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter)
    slow = ScriptedExecutor(model=lambda new, n: 40, on_step=lambda plan: time.sleep(0.01))
    with running(scripted(slow), traces=traces) as server:
        body = {"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        until(lambda: traces._queue.taken == 4)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root = spans["text_completion tiny"]
    assert (root.attributes["error.type"], root.attributes["http.response.status_code"]) == ("client_gone", 499)
    assert root.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert root.attributes["gen_ai.usage.output_tokens"] > 0
    assert {"queued", "prefill", "decode"} < set(spans)
    assert root.status.status_code is StatusCode.UNSET


def test_an_answer_that_breaks_off_is_an_error() -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter)

    broken = ScriptedExecutor(fail_row=lambda new, n: {3: "secret of the machine"}.get(n))
    with running(scripted(broken), traces=traces) as server:
        server.complete("ab", max_tokens=20, stream=True, ignore_eos=True)
    root = next(span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)
    assert root.attributes["error.type"] == "model_error"
    assert root.status.status_code is StatusCode.ERROR
    assert "secret" not in root.to_json()


class Stuck(SpanExporter):
    """A collector that does not answer until it is let."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def export(self, spans: Any) -> SpanExportResult:
        self.free.wait(20)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None: ...


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Of the server, whatever a test before has made of its logger."""
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level("INFO", LOG.name)
    return caplog


def test_a_stuck_collector_costs_spans_and_nothing_else(log: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    traces = Traces(stuck, max_queue=512)
    with running(scripted(), traces=traces) as server:
        for _ in range(140):  # four spans each
            assert server.complete("a", max_tokens=1).status_code == 200
        until(lambda: traces.counts()["dropped"] == 140 * 4 - 512)
        assert 'liushui_spans_total{end="dropped"} 48.0' in server.client.get("/metrics").text
        stuck.free.set()
    assert traces.counts() == {"sent": 0, "failed": 512, "dropped": 48}
    lost = [record for record in log.records if record.getMessage() == "spans_lost"]
    assert len(lost) == 1  # and not once a request
    assert next(r for r in log.records if r.getMessage() == "traces").facts["failed"] == 512


class Collector:
    """A stub that keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                collector.paths.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        parsed = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for one in parsed for r in one.resource_spans for s in r.scope_spans for span in s.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_the_end_sends_what_is_left(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP. Batches would leave in a minute: what comes, comes because the server stops."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    url = ServerConfig(otlp_traces_endpoint=collector.url).validate().traces_url
    assert url == f"{collector.url}/v1/traces"
    traces = Traces.to(url)
    with running(scripted(), traces=traces) as server:
        answer = server.complete("a", max_tokens=3, ignore_eos=True)
        assert not collector.bodies
    assert collector.paths == ["/v1/traces"]
    assert sorted(span.name for span in collector.spans()) == ["decode", "prefill", "queued", "text_completion tiny"]
    root = next(span for span in collector.spans() if span.name == "text_completion tiny")
    values = {item.key: item.value for item in root.attributes}
    assert values["gen_ai.response.id"].string_value == answer.json()["id"]
    assert values["gen_ai.usage.output_tokens"].int_value == 3
    assert traces.counts() == {"sent": 4, "failed": 0, "dropped": 0}


SERVER_OF_ITS_OWN = """
import sys
from liushui.server.run import main
from liushui.server.settings import ServerConfig
from tests.support.serving import scripted

config = ServerConfig(port=0, otlp_traces_endpoint=sys.argv[1], log_format="json")
main(scripted, config, lambda address: print(address, flush=True))
"""


def test_a_signal_to_stop_sends_what_is_left(collector: Collector) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_SERVICE_NAME": "by-variable"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_OF_ITS_OWN, collector.url],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert len(collector.spans()) == 4
    assert b"by-variable" in collector.bodies[0]  # the SDK's variables are the SDK's business
    lines = [json.loads(line) for line in log.splitlines()]
    said = next(line for line in lines if line["event"] == "traces")
    assert (said["level"], said["sent"], said["unsent"]) == ("info", 4, 0)


def test_the_end_does_not_wait_for_a_stuck_collector(log: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    traces = Traces(stuck)
    with running(scripted(), traces=traces, drain_timeout=0.6) as server:
        assert server.complete("a", max_tokens=1).status_code == 200
    assert not stuck.free.is_set()
    assert next(r for r in log.records if r.getMessage() == "traces").facts["unsent"] == 4
    stuck.free.set()
    until(lambda: traces.counts()["failed"] == 4)


def test_no_collector_harms_nothing(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.2")
    dead = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{dead.server_port}/v1/traces"
    dead.server_close()  # nobody listens there now
    traces = Traces.to(url)
    with running(scripted(), traces=traces) as server:
        for _ in range(5):
            assert server.complete("a", max_tokens=1).status_code == 200
        assert server.client.get("/ready").status_code == 200
    counts = next(r for r in log.records if r.getMessage() == "traces").facts
    assert (counts["sent"], counts["failed"], counts["dropped"], counts["unsent"]) == (0, 20, 0, 0)


def test_a_span_that_cannot_be_made_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr("liushui.server.otlp.span_of", broken)
    with running(scripted(), traces=Traces(InMemorySpanExporter())) as server:
        assert server.complete("a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("url", ["collector:4318", "ftp://a/b", "http://", "http://a b/", "http://a:99999/", "x"])
def test_an_endpoint_that_is_none(url: str) -> None:
    with pytest.raises(ParameterError, match="otlp_traces_endpoint: must be a URL such as http://"):
        ServerConfig(otlp_traces_endpoint=url).validate()


def test_settings_that_the_sdk_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000")
    with pytest.raises(ParameterError, match=r"otlp_traces_endpoint: OpenTelemetry refuses its settings \(.*OTEL_\*"):
        Traces.to("http://127.0.0.1:9/v1/traces")


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(LiushuiError, match=re.escape("--otlp-traces-endpoint: needs OpenTelemetry's SDK")) as caught:
        SERVER.build({"otlp_traces_endpoint": "http://127.0.0.1:4318"})
    assert "pip install 'liushui[otel]'" in str(caught.value)
    assert ServerConfig().validate().traces_url is None  # and without the flag nobody asks for it


def test_the_sdk_is_loaded_only_where_it_is_asked_for() -> None:
    code = "import json, sys, liushui.server.run, liushui.cli.serve; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = json.loads(done.stdout)
    assert "liushui.server.run" in loaded
    assert not [name for name in loaded if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]


def test_fastapi_sends_nothing_of_its_own(traced: Traced) -> None:
    """Where its version can: its log records would hold what clients sent."""
    from liushui.server.app import build_app

    app = build_app(traced.server.engine, ServerConfig())._app
    native: Callable[[], bool] | None = getattr(getattr(app, "_native_telemetry", None), "enabled", None)
    config = getattr(app, "_telemetry", {})
    assert not any(config.get(name) for name in ("tracing", "metrics", "logs", "auto_configure"))
    assert native is None or native() is False
