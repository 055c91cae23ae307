"""`liushui explain`: what happens to prompts, with the tensors of the real engine."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from liushui.cli.common import load_llm, note
from liushui.cli.explain_words import Words, pick_lang
from liushui.cli.options import engine_group, with_flags
from liushui.config import EngineConfig
from liushui.errors import LiushuiError

if TYPE_CHECKING:
    from liushui.engine.explain import Mistake

KEPT = {"model", "dtype", "weights", "max_num_batched_tokens", "block_size", "threads", "kernels", "kv_cache_gib"}
"""Engine flags that make a difference to what is seen."""


@with_flags(engine_group(frozenset(EngineConfig.names()) - KEPT, dtype="float32"))
def explain(
    config: EngineConfig,
    prompts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or several prompts, answered together.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in each answer.")] = 4,
    padded: Annotated[bool, typer.Option("--padded", help="Show the left-padded way beside it, and compare.")] = False,
    without_positions: Annotated[
        bool, typer.Option("--without-positions", help="Mistake: pad, and give no position ids.")
    ] = False,
    right_pad: Annotated[bool, typer.Option("--right-pad", help="Mistake: pad on the right.")] = False,
    argmax_dim: Annotated[
        int, typer.Option(metavar="DIM", min=-1, max=1, help="Mistake: 0 chooses along the batch. Right: -1.")
    ] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page that needs nothing else.")] = None,
    lang: Annotated[Literal["zh", "en"] | None, typer.Option(help="Language. Default: the locale's.")] = None,
) -> None:
    """Show what happens to prompts, step by step: tokens, positions, KV cache, logits, and the choice.

    Everything shown is read from the running engine. --padded runs the same batch as a left-padded rectangle and checks
    that both chose the same tokens (exit code 1 if not); the mistakes show what goes wrong there.
    """
    mistake = _mistake(without_positions, right_pad, argmax_dim)
    if html is not None and not html.parent.is_dir():
        raise LiushuiError(f"--html {html}: the folder {html.parent} does not exist")
    if html is not None and html.is_dir():
        raise LiushuiError(f"--html {html} is a folder; name a file in it")
    if (config.weights, config.dtype) == ("auto", "float32"):
        config = replace(config, weights="float32")  # the same numbers on every machine
    llm = load_llm(replace(config, device="cpu"))
    from liushui.engine.explain import explain as run

    made = run(llm, prompts, max_tokens=max_tokens, padded=padded, mistake=mistake)
    words = Words(pick_lang(lang))
    if html is not None:
        _write(html, made, words)
    if as_json:
        print(json.dumps(asdict(made), ensure_ascii=False, indent=1))
    elif html is None:
        from rich.console import Console

        from liushui.cli.explain_tables import show

        show(made, words, Console(highlight=False, width=None if Console().is_terminal else 140))
    if mistake is None and not all(made.same):
        if config.dtype != "float32":
            note("rounded products make much of little: tokens nearly tied may swap. Compare with --dtype float32")
        raise typer.Exit(1)


def _mistake(without_positions: bool, right_pad: bool, argmax_dim: int) -> "Mistake | None":
    chosen: list[Mistake] = []
    if without_positions:
        chosen.append("without-positions")
    if right_pad:
        chosen.append("right-pad")
    if argmax_dim == 0:
        chosen.append("argmax-dim-0")
    if len(chosen) > 1:
        raise LiushuiError("one mistake at a time: --without-positions, --right-pad or --argmax-dim 0")
    return chosen[0] if chosen else None


def _write(path: Path, made: Any, words: Words) -> None:
    from liushui.cli.explain_html import page

    try:
        path.write_text(page(made, words), encoding="utf-8")
    except OSError as error:
        raise LiushuiError(f"cannot write {path}: {error.strerror}") from None
    note(f"page: {path}")
