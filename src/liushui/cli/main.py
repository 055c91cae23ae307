"""The `liushui` command."""

from typing import Annotated

import typer

from liushui.cli import bench
from liushui.cli.chat import chat
from liushui.cli.common import guarded, version
from liushui.cli.demo import demo
from liushui.cli.diff import diff
from liushui.cli.explain import explain
from liushui.cli.generate import generate
from liushui.cli.models import models, pull
from liushui.cli.serve import serve
from liushui.cli.verify import verify

app = typer.Typer(
    name="liushui",
    help="An LLM inference engine that works like a running banquet: nobody waits for anybody.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, serve, pull, models, demo, diff, explain, verify):
    app.command()(guarded(command))
bench.app.command("serve")(guarded(bench.serve))
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"liushui {version()}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="liushui")


if __name__ == "__main__":
    main()
