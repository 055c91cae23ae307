"""`liushui pull` and `liushui models`."""

from pathlib import Path
from typing import Annotated

import typer

from liushui.cli.common import note


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An alias (see liushui models) or a name on the Hugging Face hub.")
    ],
) -> None:
    """Fetch a model, so that it works offline afterwards."""
    from liushui.cli.progress import Download
    from liushui.loading import open_checkpoint
    from liushui.loading.hub import pull as fetch

    with Download() as bar:
        path = fetch(name, bar)
    if Path(name).exists():  # nothing was fetched: is it a model at all?
        open_checkpoint(path)
    note(f"{name} is here:")
    print(path)


def models() -> None:
    """List models: aliases, what is on this machine, and the architectures that work."""
    from liushui.loading.hub import list_local
    from liushui.models.registry import ARCHITECTURES

    lines = [("NAME", "SIZE", "WHAT", "WHERE")]
    for row in list_local():
        where = str(row.path) if row.path is not None else f"not here; liushui pull {row.name}"
        lines.append((row.name, f"{row.nbytes / 1e6:,.0f} MB", row.summary, where))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for name, size, what, where in lines:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {what:<{widths[2]}}  {where}")
    print()
    print("Any GGUF file, folder with safetensors files, or name on the Hugging Face hub works too, if its")
    print("architecture is one of: " + ", ".join(sorted(ARCHITECTURES)))
