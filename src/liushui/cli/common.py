"""What the commands share."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from liushui.config import EngineConfig
from liushui.errors import LiushuiError


def note(text: str) -> None:
    """One line for the person, on standard error, where it cannot mix with rows."""
    print(text, file=sys.stderr, flush=True)


def version() -> str:
    from importlib.metadata import version as installed

    return installed("liushui")


def load_llm(config: EngineConfig) -> Any:
    """The engine; its model is fetched first if it is not here.

    Imported here, because torch takes a second to import and `--help` should not.
    """
    from liushui.cli.progress import Download
    from liushui.loading.hub import resolve

    with Download() as bar:
        resolve(config.model, progress=bar)

    from liushui.engine.llm import LLM

    return LLM(config=config)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one clear message and exit code 2; anything else keeps its trace."""

    @wraps(command)
    def run(*args: Any, **given: Any) -> None:
        try:
            command(*args, **given)
        except LiushuiError as error:
            note(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None

    return run
