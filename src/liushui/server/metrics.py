"""/metrics: the engine's numbers and the server's own, in Prometheus' text format, under names that stay.

Everything the engine knows comes from its event log (`ServingEngine.stats`); nothing is measured here but HTTP.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from liushui import __version__
from liushui.engine.serving import Histogram, ServingEngine, Stats
from liushui.server.settings import Compat
from liushui.server.visit import Visit

if TYPE_CHECKING:
    from liushui.server.otlp import Traces

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "waiting": ("requests_waiting", "Answers that wait for their turn."),
    "waiting_tokens": ("waiting_tokens", "Tokens to compute before those who wait have their first one."),
    "running": ("requests_running", "Answers in the batch."),
    "kv_usage": ("kv_cache_usage_ratio", "Share of the KV blocks that somebody owns."),
    "unfinished_requests": ("requests_unfinished", "Requests accepted and not ended."),
    "output_tokens_per_second": ("output_tokens_per_second", "Measured over the last seconds."),
    "retry_after": ("retry_after_seconds", "What a refused request would be told now."),
}
"""Field of `Gauges` -> (name without liushui_, help)."""
SECONDS = frozenset({"time_to_first_token", "inter_token", "queue", "prefill", "decode", "request", "step"})
VLLM_COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "output_tokens": "generation_tokens",
    "preemptions": "num_preemptions",
    "cached_tokens": "prefix_cache_hits",
}
VLLM_HISTOGRAMS = {
    "time_to_first_token": ("time_to_first_token_seconds",),
    "inter_token": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "request": ("e2e_request_latency_seconds",),
    "queue": ("request_queue_time_seconds",),
    "prefill": ("request_prefill_time_seconds",),
    "decode": ("request_decode_time_seconds",),
    "step_tokens": ("iteration_tokens_total",),
    "prompt_tokens": ("request_prompt_tokens",),
    "answer_tokens": ("request_generation_tokens",),
}


class Metrics:
    """Collects when it is asked."""

    def __init__(self, engine: ServingEngine, compat: Compat, traces: "Traces | None" = None) -> None:
        self._engine = engine
        self._traces = traces
        self._compat = compat
        self._visits: Counter[tuple[str, str]] = Counter()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def count(self, visit: Visit) -> None:
        """One answered HTTP request."""
        self._visits[_route(visit.path), str(visit.status)] += 1

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Prometheus' interface."""
        stats = self._engine.stats()
        yield InfoMetricFamily(
            "liushui_build", "What runs here.", {"version": __version__, "model": self._engine.info.served_names[0]}
        )
        ready = GaugeMetricFamily("liushui_ready", "1: a request sent now would be served.")
        ready.add_metric([], float(self._engine.ready().ready))
        yield ready
        http = CounterMetricFamily("liushui_http_requests", "Answered HTTP requests.", labels=["path", "status"])
        for (path, status), count in sorted(self._visits.items()):
            http.add_metric([path, status], count)
        yield http
        if self._traces is not None:
            spans = CounterMetricFamily("liushui_spans", "OpenTelemetry spans, by what came of them.", labels=["end"])
            for end, count in self._traces.counts().items():
                spans.add_metric([end], count)
            yield spans
        yield from _own(stats)
        if self._compat == "vllm":
            yield from _vllm(stats, self._engine.info.served_names[0])


def _route(path: str) -> str:
    """A label with few values: unknown paths are one."""
    return path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"


PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ready",
        "/metrics",
        "/debug/requests",
        "/openapi.json",
    }
)


def _own(stats: Stats) -> Iterator[Any]:
    for name, (own, text) in GAUGES.items():
        gauge = GaugeMetricFamily(f"liushui_{own}", text)
        gauge.add_metric([], getattr(stats.gauges, name))
        yield gauge
    for name, value in stats.counters.items():
        counter = CounterMetricFamily(f"liushui_{name}", f"{name.replace('_', ' ')} since the start.")
        counter.add_metric([], value)
        yield counter
    for name, label, found in (
        ("answers_finished", "reason", stats.finished),
        ("requests_refused", "reason", stats.refused),
    ):
        counter = CounterMetricFamily(f"liushui_{name}", f"{name.replace('_', ' ')} since the start.", labels=[label])
        for reason, count in found.items():
            counter.add_metric([reason], count)
        yield counter
    for name, histogram in stats.histograms.items():
        unit = "seconds" if name in SECONDS else "count"
        own = f"liushui_{name}_{unit}" if unit == "seconds" else f"liushui_{name}_histogram"
        yield _histogram(own, f"{name.replace('_', ' ')} ({unit}).", histogram)


def _vllm(stats: Stats, model: str) -> Iterator[Any]:
    """vLLM's names (docs.vllm.ai, usage/metrics) for what means the same here."""
    labels, values = ["model_name", "engine"], [model, "0"]
    for name, number in (
        ("num_requests_running", stats.gauges.running),
        ("num_requests_waiting", stats.gauges.waiting),
        ("kv_cache_usage_perc", stats.gauges.kv_usage),
    ):
        gauge = GaugeMetricFamily(f"vllm:{name}", "As in vLLM.", labels=labels)
        gauge.add_metric(values, number)
        yield gauge
    for name, theirs in VLLM_COUNTERS.items():
        counter = CounterMetricFamily(f"vllm:{theirs}", "As in vLLM.", labels=labels)
        counter.add_metric(values, stats.counters.get(name, 0))
        yield counter
    queries = CounterMetricFamily("vllm:prefix_cache_queries", "As in vLLM.", labels=labels)
    queries.add_metric(values, stats.counters.get("prompt_tokens", 0))
    yield queries
    success = CounterMetricFamily("vllm:request_success", "As in vLLM.", labels=[*labels, "finished_reason"])
    for reason, count in stats.finished.items():
        success.add_metric([*values, reason], count)
    yield success
    for name, all_theirs in VLLM_HISTOGRAMS.items():
        if name in stats.histograms:
            for theirs in all_theirs:
                yield _histogram(f"vllm:{theirs}", "As in vLLM.", stats.histograms[name], labels, values)


def _histogram(
    name: str, text: str, found: Histogram, labels: Iterable[str] = (), values: Iterable[str] = ()
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=list(labels))
    buckets, below = [], 0
    for bound, count in zip(found.bounds, found.counts, strict=False):
        below += count
        buckets.append((f"{bound:g}", float(below)))
    buckets.append(("+Inf", float(found.count)))
    family.add_metric(list(values), buckets=buckets, sum_value=found.total)
    return family
