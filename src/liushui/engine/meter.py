"""The numbers of a server: counted where the news arrive, read by /metrics."""

from bisect import bisect_left
from collections import Counter

from liushui.engine.admission import Queue, Rate
from liushui.engine.messages import Fullness, Step
from liushui.engine.outputs import RequestOutput
from liushui.engine.serving import Gauges, Histogram, Stats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_HISTOGRAMS = {
    "time_to_first_token": _SECONDS,
    "inter_token": _SECONDS,
    "queue": _SECONDS,
    "prefill": _SECONDS,
    "decode": _SECONDS,
    "request": _SECONDS,
    "step": _SECONDS,
    "step_tokens": _TOKENS,
    "prompt_tokens": _TOKENS,
    "answer_tokens": _TOKENS,
}
_COUNTERS = (
    "requests",
    "prompt_tokens",
    "output_tokens",
    "cached_tokens",
    "preemptions",
    "steps",
    "wasted_tokens",
    "engine_restarts",
    "retried_requests",
)


class Buckets:
    """A histogram that is being filled."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """`times` observations of `value`; a bound belongs to the bucket below it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def seen(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class Meter:
    """Counts. What the loop counts itself (`Fullness`) starts again with its process, the sums here do not."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.house = Fullness()
        self.histograms = {name: Buckets(bounds) for name, bounds in _HISTOGRAMS.items()}
        self._output_rate = Rate(10.0)

    def stepped(self, steps: list[Step], house: Fullness) -> None:
        for step in steps:
            self.histograms["step"].add(step.seconds)
            self.histograms["step_tokens"].add(step.num_tokens)
        self.counters["steps"] += len(steps)
        self.counters["preemptions"] += house.preemptions - self.house.preemptions
        self.house = house

    def restarted(self) -> None:
        self.counters["engine_restarts"] += 1
        self.house = Fullness()

    def tokens(self, count: int, now: float) -> None:
        """Tokens that came for answers which were still open."""
        self.counters["output_tokens"] += count
        self._output_rate.add(now, count)

    def gap(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` after the one before them."""
        self.histograms["inter_token"].add(seconds / count, count)

    def accepted(self, num_prompt: int) -> None:
        self.counters["requests"] += 1
        self.counters["prompt_tokens"] += num_prompt
        self.histograms["prompt_tokens"].add(num_prompt)

    def ended(self, output: RequestOutput) -> None:
        self.counters["cached_tokens"] += output.num_cached_tokens
        for answer in output.outputs:
            self.finished[str(answer.finish_reason)] += 1
            self.histograms["answer_tokens"].add(len(answer.token_ids))
        if (timings := output.timings) is None:
            return
        spans = {
            "time_to_first_token": timings.time_to_first_token,
            "queue": timings.queued,
            "prefill": timings.prefill,
            "decode": timings.decode,
            "request": timings.total,
        }
        for name, seconds in spans.items():
            if seconds is not None:
                self.histograms[name].add(seconds)

    def stats(self, queue: Queue, unfinished: int, now: float) -> Stats:
        house = self.house
        gauges = Gauges(
            waiting=max(house.waiting, queue.requests),
            waiting_tokens=queue.tokens,
            running=house.running,
            kv_usage=1 - house.free_blocks / house.num_blocks if house.num_blocks > 1 else 0.0,
            unfinished_requests=unfinished,
            output_tokens_per_second=self._output_rate.per_second(now),
            retry_after=queue.retry_after(now),
        )
        histograms = {name: buckets.seen() for name, buckets in self.histograms.items()}
        return Stats(gauges, dict(self.counters), dict(self.finished), dict(self.refused), histograms)
