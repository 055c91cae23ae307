"""`liushui generate`: a file of prompts in, a file of answers out."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from liushui.cli.common import load_llm, note, version
from liushui.cli.job import Job, Meter, Tally, Template
from liushui.cli.options import engine_group, sampling_group, with_flags
from liushui.cli.output import OutputError, RowWriter
from liushui.cli.rows import read_rows
from liushui.cli.source import Source
from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.engine.interrupts import deferred_interrupt
from liushui.errors import LiushuiError


@with_flags(engine_group(), sampling_group(temperature=0.0, max_tokens=256))
def generate(
    config: EngineConfig,
    params: SamplingParams,
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File of prompts: .txt or .jsonl; - is standard input.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.jsonl", help="Where the rows go. Default: standard output."),
    ] = None,
    input_format: Annotated[
        Literal["auto", "txt", "jsonl"],
        typer.Option("--format", help="txt: a prompt a line. jsonl: an object a line."),
    ] = "auto",
    template: Annotated[
        Template,
        typer.Option(
            help="auto: a prompt is a user's message in the model's chat template, if it has one. none: as it is.",
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a picture: who sat in the batch when.")
    ] = None,
    json_report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save settings and measurements as JSON.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every setting; write effective parameters in each row.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on standard error.")] = False,
) -> None:
    """Answer a file of prompts.

    A .txt file has a prompt a line. A line of a .jsonl file has prompt, prompt_token_ids or messages, and may have
    custom_id and any sampling parameter under the name that the Python API gives it; it goes before the flag.

    Rows are written as they finish, one JSON object a line; "index" and "line" say where each comes from. A row
    that cannot be answered becomes a row with "error" and harms no other.

    Exit code: 0 all rows answered; 1 some rows failed, or the output could not be written; 2 a mistake in the
    command, nothing was done; 130 interrupted, the rows that were finished are kept.
    """
    to_stdout = output is None or str(output) == "-"
    writer = RowWriter(None if to_stdout else output, overwrite, None if prompts == "-" else prompts)
    _check_extras(timeline, json_report)
    with Source(prompts, input_format) as source:
        llm = load_llm(config)
        writer.open()
        if not quiet:
            _announce(llm, params, source, writer, template, verbose)
        code = _run(llm, params, source, writer, template, verbose=verbose, quiet=quiet)
    try:
        _save_extras(llm, timeline, json_report, params, quiet)
    except LiushuiError as error:  # the rows are safe: not a mistake for which nothing was done
        note(f"error: {error}")
        code = code or 1
    raise typer.Exit(code)


def _run(
    llm: Any,
    params: SamplingParams,
    source: Source,
    writer: RowWriter,
    template: Template,
    *,
    verbose: bool,
    quiet: bool,
) -> int:
    """Answer all rows; returns the exit code."""
    from liushui.cli.progress import View

    view = View(Meter(llm.engine), source.total, quiet=quiet)

    def emit(row: dict[str, Any], failed: bool) -> None:
        with deferred_interrupt():
            writer.write(row)
        view.count(error=failed)

    job = Job(llm, template, emit, effective_params=verbose)
    try:
        with view:
            job.run(read_rows(iter(source), source.form, params))
    except KeyboardInterrupt:
        note(f"interrupted: {writer.count} rows are complete in {writer.name}; rows not finished are not in it")
        return 130
    except OutputError as error:
        note(f"error: {error}")
        return 1
    finally:
        writer.close()
    if not quiet:
        _conclude(job.tally, view, writer)
    elif job.tally.failed:
        note(_failures(job.tally))
    return 1 if job.tally.failed else 0


def _announce(
    llm: Any, params: SamplingParams, source: Source, writer: RowWriter, template: Template, verbose: bool
) -> None:
    """Everything that was decided for the user, before it matters."""
    for line in llm.startup_report():
        note(line)
    rows = "rows" if source.total is None else f"{source.total} rows"
    has_template = llm.tokenizer.template_hash is not None
    if template == "none":
        how = "each as it is (--template none)"
    elif has_template:
        how = "each a user's message in the model's chat template (--template none: as it is)"
    else:
        how = "each as it is (the model has no chat template)"
    note(f"input: {rows} of {source.name} ({source.form}), {how}")
    filled = llm.engine.inputs.filled(params)
    changed = {name: value for name, value in _shown(filled).items() if value != getattr(SamplingParams(), name)}
    words = ", ".join(f"{name} {value}{_remark(name, filled, llm)}" for name, value in changed.items())
    note(f"parameters: {words or 'those of SamplingParams()'}; a row's own go first")
    note(f"output: {writer.name}")
    if verbose:
        note("engine: " + json.dumps(asdict(llm.config), default=str))
        shown = {name: f"{value} ({_source(name, filled, llm)})" for name, value in _shown(filled).items()}
        note("parameters of a row that brings none: " + ", ".join(f"{name} {words}" for name, words in shown.items()))


def _source(name: str, params: SamplingParams, llm: Any) -> str:
    """Where the value that a row without its own gets comes from; in a row's effective_params "request" is both."""
    if name in params.given:
        return "command line"
    return "generation_config" if name in llm.engine.inputs.sampling_defaults else "default"


def _remark(name: str, params: SamplingParams, llm: Any) -> str:
    remarks = ["greedy"] if name == "temperature" and params.greedy else []
    remarks += ["generation_config"] if _source(name, params, llm) == "generation_config" else []
    return f" ({', '.join(remarks)})" if remarks else ""


def _conclude(tally: Tally, view: Any, writer: RowWriter) -> None:
    speed = f"{view.tokens:,} output tokens in {view.seconds:.1f} s = {view.tokens / view.seconds:,.0f} tok/s"
    note(f"{tally.answered} rows answered, {speed}")
    if tally.failed:
        note(_failures(tally))
    if writer.path is not None:
        note(f"answers: {writer.path}")


def _failures(tally: Tally) -> str:
    lines = ", ".join(map(str, tally.failed_lines)) + (", ..." if tally.failed > len(tally.failed_lines) else "")
    return f'{tally.failed} rows failed: input lines {lines}; the reason is in each row\'s "error"'


def _shown(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.names()}


def _check_extras(timeline: Path | None, json_report: Path | None) -> None:
    """Find out before the work what would fail after it."""
    for flag, path in (("--timeline", timeline), ("--json-report", json_report)):
        if path is not None and not path.parent.is_dir():
            raise LiushuiError(f"{flag} {path}: the folder {path.parent} does not exist")
        if path is not None and path.is_dir():
            raise LiushuiError(f"{flag} {path} is a folder; name a file in it")
    if timeline is not None and importlib.util.find_spec("matplotlib") is None:
        raise LiushuiError("--timeline needs matplotlib: pip install 'liushui[plot]'")
    if timeline is not None and timeline.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LiushuiError(f"--timeline {timeline}: the name must end in .png, .svg or .pdf")


def _save_extras(
    llm: Any, timeline: Path | None, json_report: Path | None, params: SamplingParams, quiet: bool
) -> None:
    from liushui.engine.metrics import summarize

    log = llm.timeline()
    if timeline is not None:
        from liushui.cli.timeline import Panel, draw, headline

        draw([Panel(log, log.house.policy, headline(summarize(log)))], timeline, "Who sat in the batch when")
        if not quiet:
            note(f"timeline: {timeline}")
    if json_report is not None:
        report = {
            "liushui": version(),
            "command": sys.argv[1:],
            "engine": asdict(llm.config),
            "sampling": _shown(llm.engine.inputs.filled(params)),
            "startup": llm.startup_report(),
            "summary": asdict(summarize(log)),
        }
        try:
            json_report.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")
        except OSError as error:
            raise LiushuiError(f"cannot write {json_report}: {error.strerror}") from None
