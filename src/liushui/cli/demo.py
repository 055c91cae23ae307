"""`liushui demo`: the same prompts with continuous batching and in static batches, measured, compared and drawn."""

import importlib.util
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from liushui.cli.common import load_llm, note
from liushui.cli.job import Job, Meter
from liushui.cli.options import engine_group, with_flags
from liushui.cli.output import RowWriter
from liushui.cli.rows import Row, read_rows
from liushui.cli.source import Source
from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError

SHIPPED = files("liushui") / "data" / "prompts.jsonl"
SHOWN = ("photosynthesis", "summary-map", "sky-blue", "zh-capital")
"""Answers that are printed, by custom_id; of another file, the first four."""


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over the prompts."""

    policy: str
    log: Any
    summary: Any
    answers: dict[int, tuple[Row, Any]]
    """index -> row and its RequestOutput."""
    errors: int


@with_flags(engine_group(frozenset({"policy"}), max_num_seqs=8))
def demo(
    config: EngineConfig,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of prompts. Default: the 64 shipped with liushui.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the answers and the picture go.")
    ] = Path("demo-out"),
) -> None:
    """Answer a file of prompts with continuous batching, then in static batches, and compare.

    Both runs have the same model, prompts, seats (--max-num-seqs) and kernels, and all prompts are there from the
    start. Exit code 1 if an answer differs between the two by a single token.
    """
    path = prompts or Path(str(SHIPPED))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LiushuiError(f"--out {out}: cannot be a folder: {error.strerror}") from None
    note(f"Part 1: continuous batching. Whoever is done leaves; the next sits down. {config.seats} seats.")
    flowing = run(replace(config, policy="continuous"), path, out, report=True)
    show_answers(flowing)
    note(f"\nPart 2: the same prompts in static batches: {config.seats} enter together and leave together.")
    static = run(replace(config, policy="static"), path, out, report=False)
    print(table(static.summary, flowing.summary))
    same = compare(static, flowing)
    picture = save_picture(static, flowing, out, config.seats)
    note(f"\nanswers: {out}/continuous.jsonl and {out}/static.jsonl" + (f"\npicture: {picture}" if picture else ""))
    raise typer.Exit(0 if same and not flowing.errors and not static.errors else 1)


def run(config: EngineConfig, path: Path, out: Path, *, report: bool) -> Run:
    """Answer the file under one policy, writing rows as they finish."""
    from liushui.cli.progress import View
    from liushui.engine.metrics import summarize

    llm = load_llm(config)
    if report:
        for line in llm.startup_report():
            note("  " + line)
    llm.generate("Hello", SamplingParams(max_tokens=8), use_tqdm=False)  # what happens once, happens here
    mark = llm.timeline().mark()
    answers: dict[int, tuple[Row, Any]] = {}
    writer = RowWriter(out / f"{config.policy}.jsonl", overwrite=True)
    writer.open()
    with Source(str(path)) as source:
        rows = list(read_rows(iter(source), source.form, SamplingParams(temperature=0, max_tokens=128)))
    view = View(Meter(llm.engine), len(rows), title=f"{config.policy:<10}")

    def emit(record: dict[str, Any], failed: bool) -> None:
        writer.write(record)
        view.count(error=failed)

    def keep(row: Row, output: Any) -> None:
        answers[row.index] = (row, output)

    try:
        with view:
            tally = Job(llm, "auto", emit).run_at_once(iter(rows), keep)
    finally:
        writer.close()
    log = llm.timeline().since(mark)
    return Run(config.policy, log, summarize(log), answers, tally.failed)


def show_answers(run: Run) -> None:
    """Print a few answers."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    found = [pair for _, pair in sorted(run.answers.items()) if pair[1].outputs]
    chosen = [pair for pair in found if pair[0].custom_id in SHOWN] or found[:4]
    for row, output in chosen:
        answer = output.outputs[0]
        panel = Panel(
            Text(answer.text.strip()),
            title=Text((row.prompt or "").split("\n")[0]),
            title_align="left",
            subtitle=Text(f"{len(answer.token_ids)} tokens, {answer.finish_reason}"),
            subtitle_align="right",
            border_style="cyan",
        )
        console.print(panel, highlight=False)


def table(static: Any, flowing: Any) -> str:
    """The two runs side by side; a ratio above 1 says how many times better continuous is."""
    lines = [("", "static", "continuous", "ratio")]
    for name, field, unit, more_is_better in (
        ("output tokens/s", "output_tokens_per_second", "", True),
        ("all answered after", "seconds", " s", False),
        ("mean time to first token", "mean_ttft", " s", False),
        ("p99 time to first token", "p99_ttft", " s", False),
        ("mean completion time", "mean_completion", " s", False),
        ("wasted slots", "wasted_slots", "%", False),
    ):
        one, two = getattr(static, field), getattr(flowing, field)
        if one is None or two is None:
            continue
        scale = 100 if unit == "%" else 1
        better, worse = (two, one) if more_is_better else (one, two)
        ratio = f"{better / worse:.2f}x" if worse else "-"
        lines.append((name, f"{one * scale:,.1f}{unit}", f"{two * scale:,.1f}{unit}", ratio))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    rows = ["  ".join([line[0].ljust(widths[0]), *(line[at].rjust(widths[at]) for at in (1, 2, 3))]) for line in lines]
    return "\n" + "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]]) + "\n"


def compare(static: Run, flowing: Run) -> bool:
    """Say whether both runs gave the same tokens."""
    different = [
        index
        for index in sorted(static.answers.keys() | flowing.answers.keys())
        if tokens(static, index) != tokens(flowing, index)
    ]
    total = sum(len(tokens(flowing, index)) for index in flowing.answers)
    if different:
        note(f"DIFFERENT: {len(different)} of {len(flowing.answers)} answers, rows {different[:8]}")
        return False
    note(f"identical: all {len(flowing.answers)} answers, {total:,} tokens, are the same in both runs")
    return True


def tokens(run: Run, index: int) -> list[int]:
    """The tokens of a row's answer; empty if there is none."""
    if index not in run.answers:
        return []
    return [token for answer in run.answers[index][1].outputs for token in answer.token_ids]


def save_picture(static: Run, flowing: Run, out: Path, seats: int) -> Path | None:
    """Draw both timelines, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        note("no picture: it needs matplotlib (pip install 'liushui[plot]')")
        return None
    from liushui.cli.timeline import Panel, draw, headline

    path = out / "timeline.png"
    panels = [
        Panel(static.log, "Static batches: enter together, leave together", headline(static.summary)),
        Panel(flowing.log, "Continuous batching: sit down on arrival, leave when done", headline(flowing.summary)),
    ]
    draw(panels, path, f"{len(flowing.answers)} prompts, {seats} seats, the same answers")
    return path
