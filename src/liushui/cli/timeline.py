"""The picture: who sat in which slot of the batch when. Drawn from the event log (`liushui[plot]`)."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liushui.engine.events import EventLog, Kind
from liushui.engine.metrics import Summary, last_steps
from liushui.errors import LiushuiError

PALETTE = ("#e07a5f", "#3d85c6", "#81b29a", "#f2b65a", "#8d6bb8", "#5fb3b3", "#c9628a", "#9aae4e", "#6c7fd8", "#c98f5a")
INK, FAINT, EMPTY = "#22303c", "#7b8794", "#e6e9ec"


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time in which one sequence used one slot without a pause."""

    seq_id: str
    slot: int
    start: float
    """Seconds since the first step."""
    end: float
    prompt: bool
    """Feeding the prompt (True) or making tokens."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One run, as drawn."""

    log: EventLog
    title: str
    note: str = ""


def bars(log: EventLog) -> list[Bar]:
    """The log's steps as stretches: the steps of a sequence in one slot that follow each other, joined."""
    if not log.steps:
        return []
    zero, last_step = log.steps[0].start, last_steps(log)
    open_bars: dict[str, tuple[Bar, int]] = {}
    made: list[Bar] = []
    for number, step in enumerate(log.steps):
        for item in step.items:
            if step.step_id > last_step.get(item.seq_id, step.step_id):
                continue  # it had ended; the step was in flight
            prompt = item.num_tokens > 1 or not item.samples
            last, seen = open_bars.get(item.seq_id, (None, -2))
            joins = last is not None and seen == number - 1 and (last.slot, last.prompt) == (item.slot, prompt)
            start = last.start if last is not None and joins else step.start - zero
            if last is not None and not joins:
                made.append(last)
            open_bars[item.seq_id] = (Bar(item.seq_id, item.slot, start, step.end - zero, prompt), number)
    return made + [bar for bar, _ in open_bars.values()]


def draw(panels: Sequence[Panel], path: Path, title: str = "") -> None:
    """Save the timelines of `panels`, one above the other on one time axis, as a picture.

    Raises LiushuiError if matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise LiushuiError("the timeline needs matplotlib: pip install 'liushui[plot]'") from None
    drawn = [(panel, bars(panel.log)) for panel in panels]
    longest = max((bar.end for _, made in drawn for bar in made), default=1.0)
    rows = [max([panel.log.house.max_num_seqs, *(bar.slot + 1 for bar in made)]) for panel, made in drawn]
    head, foot, gap = 1.15, 0.65, 0.8
    heights = [0.35 + 0.19 * max(min(count, 32), 6) for count in rows]
    height = head + sum(heights) + gap * (len(panels) - 1) + foot
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        figure = pyplot.figure(figsize=(13, height), dpi=150, facecolor="white")
        top = height - head
        for number, (panel, made) in enumerate(drawn):
            box = (0.055, (top - heights[number]) / height, 0.925, heights[number] / height)
            _panel(figure.add_axes(box), panel, made, longest, rows[number], last=number == len(drawn) - 1)
            top -= heights[number] + gap
        figure.text(0.055, 1 - 0.34 / height, title, fontsize=15, fontweight="bold", va="center")
        _legend(figure, height)
        try:
            figure.savefig(path)
        except OSError as error:
            raise LiushuiError(f"cannot write {path}: {error.strerror}") from None
        finally:
            pyplot.close(figure)


def _panel(axes: Any, panel: Panel, made: list[Bar], longest: float, rows: int, last: bool) -> None:
    end = max((bar.end for bar in made), default=0.0)
    axes.barh(range(rows), end, height=0.86, color=EMPTY, linewidth=0, zorder=1)
    shades = colours(panel.log)
    for prompt in (False, True):
        chosen = [bar for bar in made if bar.prompt is prompt]
        axes.barh(
            [bar.slot for bar in chosen],
            [bar.end - bar.start for bar in chosen],
            left=[bar.start for bar in chosen],
            height=0.86,
            color=[darker(shades[bar.seq_id]) if prompt else shades[bar.seq_id] for bar in chosen],
            linewidth=0,
            zorder=3 if prompt else 2,
        )
    starts = {(bar.slot, bar.start) for bar in made}
    axes.vlines(
        [start for _, start in starts],
        [slot - 0.43 for slot, _ in starts],
        [slot + 0.43 for slot, _ in starts],
        color="white",
        linewidth=0.7,
        zorder=2.5,
    )
    axes.set_xlim(0, longest * 1.002)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks([0, rows - 1] if rows > 1 else [0], ["1", str(rows)] if rows > 1 else ["1"])
    axes.set_ylabel("seat", color=FAINT, labelpad=-4)
    axes.tick_params(length=0, colors=FAINT)
    axes.spines[:].set_visible(False)
    axes.text(0, 1.02, panel.title, transform=axes.transAxes, fontsize=11.5, fontweight="bold", va="bottom")
    axes.text(1, 1.02, panel.note, transform=axes.transAxes, fontsize=10, color=FAINT, va="bottom", ha="right")
    if end < longest * 0.985:
        axes.axvline(end, color=INK, linewidth=1.2, ymin=0.0, ymax=1.0)
        axes.text(end + longest * 0.006, rows / 2 - 0.5, f"done after {end:.1f} s", va="center", fontsize=10.5)
    if last:
        axes.set_xlabel("seconds", color=FAINT)


def _legend(figure: Any, height: float) -> None:
    from matplotlib.patches import Rectangle

    y, x = 1 - 0.62 / height, 0.055
    swatches = (
        ((darker(PALETTE[1]),), "reading the prompt"),
        ((PALETTE[1],), "writing the answer"),
        (PALETTE[:5], "one colour = one request"),
        ((EMPTY,), "an empty seat: nobody is served"),
    )
    for shades, words in swatches:
        for shade in shades:
            box = Rectangle((x, y - 0.06 / height), 0.011, 0.12 / height, color=shade, transform=figure.transFigure)
            figure.add_artist(box)
            x += 0.012
        label = figure.text(x + 0.004, y, words, fontsize=9.5, color=FAINT, va="center")
        extent = label.get_window_extent(figure.canvas.get_renderer())
        x += 0.004 + extent.width / figure.bbox.width + 0.022


def headline(summary: Summary) -> str:
    """A run in a line, for beside its title."""
    speed, waste, ttft = summary.output_tokens_per_second, summary.wasted_slots, summary.mean_ttft
    parts = (
        f"{speed:,.0f} tokens/s" if speed is not None else "",
        f"first token after {ttft:.1f} s on average" if ttft is not None else "",
        f"{waste:.0%} of the seats' time wasted" if waste is not None else "",
    )
    return "   ·   ".join(part for part in parts if part)


def colours(log: EventLog) -> dict[str, str]:
    """seq_id -> colour, by order of arrival, so that a request has the same colour in every run."""
    requests: dict[str, str] = {}
    for event in log.events:
        if event.kind is Kind.ARRIVED and event.request_id not in requests:
            requests[event.request_id] = PALETTE[len(requests) % len(PALETTE)]
    shades: dict[str, str] = {}
    for step in log.steps:
        for item in step.items:
            if item.seq_id not in shades:
                base = item.seq_id.rsplit("/", 1)[0]
                fallback = PALETTE[len(shades) % len(PALETTE)]
                shades[item.seq_id] = requests.get(item.seq_id) or requests.get(base) or fallback
    return shades


def darker(colour: str) -> str:
    """The colour of a prompt: the request's own, deeper."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, light, full = colorsys.rgb_to_hls(red, green, blue)
    deep = colorsys.hls_to_rgb(hue, light * 0.55, full)
    return "#" + "".join(f"{round(part * 255):02x}" for part in deep)
