"""`liushui diff`: the same prompts here and in transformers, and what explains each difference."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from liushui.cli.common import load_llm, note
from liushui.cli.demo import SHIPPED
from liushui.cli.options import engine_group, with_flags
from liushui.cli.rows import BadRow, Row, read_rows
from liushui.cli.source import Source
from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError

if TYPE_CHECKING:
    from liushui.engine.diff import Comparison, Question


@with_flags(engine_group(frozenset({"model", "generation_config"}), dtype="float32"))
def diff(
    config: EngineConfig,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, Hugging Face name, folder or GGUF file.")
    ] = "smollm2",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts: .txt or .jsonl. Default: those shipped with liushui.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in each answer.")] = 16,
    template: Annotated[
        Literal["auto", "none"], typer.Option(help="Put prompts into the model's chat template if it has one.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Compare greedy answers with Hugging Face transformers (pip install 'liushui[oracle]').

    For each prompt: the first token that differs, the margin of the two candidates there, and the cause: a tie within
    rounding, numerics, the tokenizer, the chat template, or a bug. Exit code 1 for the last three.
    """
    with Source(str(prompts or SHIPPED)) as source:
        rows = list(islice(read_rows(iter(source), source.form, SamplingParams()), limit))
    from liushui.cli.peer import Transformers

    llm = load_llm(replace(config, model=model))
    templated = template == "auto" and llm.tokenizer.template_hash is not None
    questions = questions_of(rows, templated)
    from liushui.engine.diff import diff as run
    from liushui.engine.diff import limits_of
    from liushui.loading.hub import resolve

    for line in llm.startup_report():
        note(line)
    peer = Transformers(resolve(model))
    note(f"beside: {peer.name}, float32")
    limits = limits_of(llm.engine.executor)
    note(f"limits: logits closer than {limits.tie} may swap; log-probabilities {limits.error} apart are a bug")
    made = []
    for comparison in run(llm, peer, questions, max_tokens, limits):
        made.append(comparison)
        if as_json:
            row = {"line": rows[comparison.index].line, "passed": comparison.passed} | asdict(comparison)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    if not as_json:
        _print(made, rows)
    if not all(comparison.passed for comparison in made):
        raise typer.Exit(1)


def questions_of(rows: Iterable[Row | BadRow], templated: bool) -> "list[Question]":
    """What to compare. Raises `LiushuiError` for a line that is no prompt."""
    from liushui.engine.diff import Question

    questions = []
    for row in rows:
        if isinstance(row, BadRow):
            raise LiushuiError(f"line {row.line}: {row.message}")
        messages = row.messages
        if messages is None and row.prompt is not None and templated:
            messages = [{"role": "user", "content": row.prompt}]
        questions.append(Question(messages, row.prompt if messages is None else None, row.prompt_token_ids))
    return questions


def _print(made: "Sequence[Comparison]", rows: "Sequence[Row | BadRow]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Beside Hugging Face transformers", title_justify="left")
    for name in ("line", "verdict", "same tokens", "ours", "theirs", "margin", "log-probabilities apart"):
        table.add_column(name)
    for found in made:
        style = "green" if found.cause == "same" else "yellow" if found.passed else "bold red"
        at = "" if found.position is None else f"at {found.position}: "
        table.add_row(
            str(rows[found.index].line), Text(found.cause, style=style), str(found.compared),
            Text(at + found.ours if found.ours else ""), Text(found.theirs),
            "" if found.margin is None else f"{found.margin:.2g}", "" if found.error is None else f"{found.error:.1e}",
        )  # fmt: skip
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(table)
    counts = Counter(found.cause for found in made)
    words = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
    failed = sum(not found.passed for found in made)
    console.print(f"{'FAILED' if failed else 'verdict: equal within rounding'}: {words}")
