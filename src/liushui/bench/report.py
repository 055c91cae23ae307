"""What was seen, in numbers. A percentile that too few samples carry is not given.

The p-th percentile of n samples stands on the n (1 - p) above it: with fewer than `TAIL` of those it is the largest few
values under another name, and moves from run to run. So p99 needs 1,000 samples, p90 100, p50 20.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liushui.bench.load import Seen

TAIL = 10
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def needed(quantile: float) -> int:
    """Samples that carry this quantile."""
    return round(TAIL / (1 - quantile))


@dataclass(frozen=True, slots=True)
class Spread:
    """One measure over all requests: mean, and the percentiles that the samples carry."""

    samples: int
    mean: float | None
    quantiles: Mapping[str, float | None]
    """None: too few samples."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        found = {name: _quantile(ordered, q) if len(ordered) >= needed(q) else None for name, q in QUANTILES.items()}
        return cls(len(ordered), sum(ordered) / len(ordered) if ordered else None, found)

    def as_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "mean": self.mean, **self.quantiles}

    def line(self, name: str) -> str:
        """For a person, in milliseconds."""
        if self.mean is None:
            return f"{name}: nothing measured"
        parts = [f"mean {self.mean * 1000:,.1f} ms"]
        for label, q in QUANTILES.items():
            value = self.quantiles[label]
            parts.append(
                f"{label} {value * 1000:,.1f} ms" if value is not None else f"{label} needs {needed(q):,} samples"
            )
        return f"{name}: {', '.join(parts)} ({self.samples:,} samples)"


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Report:
    """A run."""

    settings: Mapping[str, Any]
    seen: Sequence[Seen]

    @property
    def good(self) -> list[Seen]:
        return [item for item in self.seen if item.ok]

    @property
    def seconds(self) -> float:
        """From the first that was due to the last answer."""
        ends = [item.last for item in self.seen if item.last is not None]
        return max(ends, default=0.0) - min((item.due for item in self.seen), default=0.0)

    def spreads(self) -> dict[str, Spread]:
        """Seconds: TTFT, end to end, and refusals (503) from when a request was due; ITL between two chunks of an
        answer."""
        good = self.good
        return {
            "ttft": Spread.of([item.ttft for item in good if item.ttft is not None]),
            "itl": Spread.of([gap for item in good for gap in item.gaps]),
            "e2e": Spread.of([item.total for item in good if item.total is not None]),
            "refused": Spread.of([item.refused for item in self.seen if item.refused is not None]),
            "client_lateness": Spread.of([item.sent - item.due for item in self.seen]),
        }

    def errors(self) -> dict[str, int]:
        """What went wrong -> how often."""
        found: dict[str, int] = {}
        for item in self.seen:
            if not item.ok:
                what = f"HTTP {item.status}" if item.status not in (0, 200) else (item.error or "unknown").split(":")[0]
                found[what] = found.get(what, 0) + 1
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        good, seconds = self.good, self.seconds
        rate = {
            "requests_per_second": len(good) / seconds if seconds else None,
            "output_tokens_per_second": sum(item.output_tokens for item in good) / seconds if seconds else None,
            "total_tokens_per_second": (
                sum(item.output_tokens + item.prompt_tokens for item in good) / seconds if seconds else None
            ),
        }
        return {
            "settings": dict(self.settings),
            "requests": len(self.seen),
            "completed": len(good),
            "failed": len(self.seen) - len(good),
            "errors": self.errors(),
            "seconds": seconds,
            **rate,
            "seconds_spread": {name: spread.as_dict() for name, spread in self.spreads().items()},
        }

    def lines(self) -> list[str]:
        """For a person."""
        found = self.as_dict()
        rate = found["requests_per_second"]
        lines = [
            f"{found['completed']:,} of {found['requests']:,} requests answered in {found['seconds']:.1f} s"
            + (f": {rate:.2f} requests/s, {found['output_tokens_per_second']:,.1f} output tokens/s" if rate else "")
        ]
        if found["errors"]:
            lines.append("failed: " + ", ".join(f"{count:,} x {what}" for what, count in found["errors"].items()))
        names = {"ttft": "time to first token", "itl": "between chunks", "e2e": "end to end"}
        spreads = self.spreads()
        lines += [spreads[name].line(words) for name, words in names.items()]
        if spreads["refused"].samples:
            lines.append(spreads["refused"].line("refused with 503"))
        late = spreads["client_lateness"]
        if late.mean is not None and late.mean > 0.05:
            lines.append(f"the client itself was {late.mean * 1000:.0f} ms late on average: use a stronger one")
        return lines


def plot(report: Report, path: Path) -> None:
    """Three pictures: TTFT over time, and the distributions of TTFT and of the gaps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (over_time, first, gaps) = plt.subplots(1, 3, figsize=(14, 4))
    good = report.good
    over_time.scatter([item.due for item in good], [item.ttft for item in good], s=8)
    over_time.set(xlabel="due (s)", ylabel="time to first token (s)", title="over the run")
    for axis, values, title in (
        (first, [item.ttft or 0.0 for item in good], "time to first token (s)"),
        (gaps, [gap for item in good for gap in item.gaps], "between chunks (s)"),
    ):
        if values:
            axis.ecdf(values)
        axis.set(xlabel=title, ylabel="share of samples")
        axis.locator_params(axis="x", nbins=6)
    figure.suptitle(f"{report.settings.get('model')} at {report.settings.get('rate')} requests/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
