"""`liushui verify`: the same bits however an answer is computed, tried on this machine with this model."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from liushui.cli.common import load_llm, note
from liushui.cli.options import engine_group, with_flags
from liushui.config import EngineConfig

if TYPE_CHECKING:
    from liushui.engine.verify import Verdict

FIXED = frozenset(
    {"model", "policy", "prefix_caching", "max_num_seqs", "max_num_batched_tokens", "seed", "generation_config"}
)
"""Settings that the matrix itself varies."""


@with_flags(engine_group(FIXED))
def verify(
    config: EngineConfig,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, Hugging Face name, folder or GGUF file.")] = (
        "smollm2"
    ),
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in each answer.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrix as JSON.")] = False,
) -> None:
    """Prove on this machine that a model's answers do not depend on how they are computed.

    Requests with six kinds of sampling parameters are answered alone, and then batched, in chunks, preempted, from the
    prefix cache and in static groups. Tokens, texts and log-probabilities must be the same bit for bit. Exit code 1 if
    anything differs.
    """
    from liushui.engine.verify import report
    from liushui.engine.verify import verify as run

    llm = load_llm(replace(config, model=model))
    for line in llm.startup_report():
        note(line)
    started = time.perf_counter()
    verdicts = []
    for verdict in run(llm, max_tokens=max_tokens):
        verdicts.append(verdict)
        note(f"{verdict.way}: {'the same bits' if verdict.passed else 'DIFFERS'}")
    if as_json:
        print(json.dumps(report(verdicts, llm.startup_report), indent=2, ensure_ascii=False))
    else:
        _print(verdicts, time.perf_counter() - started)
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


def _print(verdicts: "Sequence[Verdict]", seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Compared with the request alone, bit for bit", title_justify="left")
    table.add_column("way", no_wrap=True)
    table.add_column("policy")
    for case in verdicts[0].cases:
        table.add_column(case, justify="center")
    table.add_column("what happened")
    for verdict in verdicts:
        marks = ["[green]same[/]" if found is None else "[bold red]DIFFERS[/]" for found in verdict.cases.values()]
        happened = ", ".join(f"{count} {name}" for name, count in verdict.happened.items() if count and name != "batch")
        missing = f"; [bold red]no {verdict.missing}: not tried[/]" if verdict.missing else ""
        table.add_row(verdict.way, verdict.policy, *marks, f"{happened}, batch of {verdict.happened['batch']}{missing}")
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for verdict in verdicts:
        for case, found in verdict.cases.items():
            if found is not None:
                console.print(f"{verdict.way}, {case}: {found}", markup=False, highlight=False)
    failed = sum(not verdict.passed for verdict in verdicts)
    policies = " and ".join(sorted({verdict.policy for verdict in verdicts}))
    words = f"verified: {len(verdicts)} ways, policies {policies}, the same bits"
    words = f"FAILED: {failed} of {len(verdicts)} ways" if failed else words
    console.print(f"{words} ({seconds:.1f} s)", highlight=False)
