"""A line of progress on a terminal, or nothing at all."""

import sys
from types import TracebackType
from typing import Any, Self

from liushui.engine.engine import Engine


class Progress:
    """How many prompts are done, tokens per second, and who runs and waits. Shows nothing unless `show` and standard
    error is a terminal; `rich` is imported only then."""

    def __init__(self, engine: Engine, total: int, *, show: bool) -> None:
        self._tokens = engine.num_output_tokens
        self._start = engine.clock()
        self._total = total
        self.shown = show and total > 0 and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("answers"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rate]:,.1f} tokens/s"),
                TextColumn("{task.fields[running]} running, {task.fields[waiting]} waiting"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, rate=0.0, running=0, waiting=0)
        return self

    def update(self, engine: Engine, done: int) -> None:
        """`done`: prompts answered so far."""
        if self._bar is None:
            return
        tokens = engine.num_output_tokens - self._tokens
        seconds = engine.clock() - self._start
        running = engine.scheduler.num_running
        self._bar.update(
            self._task,
            completed=done,
            rate=tokens / seconds if seconds > 0 else 0.0,
            running=running,
            waiting=max(self._total - done - running, 0),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
