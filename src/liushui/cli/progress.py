"""What one sees while waiting: a bar on a terminal, a line now and then elsewhere. On standard error."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from liushui.cli.job import Load

LINE_EVERY = 10.0
"""Seconds between two lines where standard error is not a terminal."""


class View:
    """Counts rows and shows them; use as a context manager."""

    def __init__(self, load: Callable[[], Load], total: int | None, *, quiet: bool = False, title: str = "") -> None:
        self.done = 0
        self.errors = 0
        self.total = total
        self.title = title
        self._load = load
        self._quiet = quiet
        self._started = self._told = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            width = 24 if self._console.width >= 100 else 10
            self._bar = Progress(
                _Words(self),
                BarColumn(width),
                _Rows(self),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=8,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "View":
        self._started = self._told = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, *, error: bool = False) -> None:
        """One more row is done."""
        self.done += 1
        self.errors += error
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif not self._quiet and time.monotonic() - self._told >= LINE_EVERY:
            self._told = time.monotonic()
            self._console.print(f"{self.label}{self.rows()}, {self.speed()}", highlight=False, soft_wrap=True)

    @property
    def label(self) -> str:
        return f"{self.title}  " if self.title else ""

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def tokens(self) -> int:
        return self._load().tokens

    def rows(self) -> str:
        text = f"{self.done}/{self.total}" if self.total is not None else f"{self.done} done"
        return text + (f", {self.errors} failed" if self.errors else "")

    def speed(self) -> str:
        load = self._load()
        return f"{load.tokens / self.seconds:,.0f} tok/s, {load.running} running, {load.waiting} waiting"


class _Words(ProgressColumn):
    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view

    def render(self, task: Task) -> Text:
        return Text(self.view.label + self.view.speed())


class _Rows(ProgressColumn):
    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view

    def render(self, task: Task) -> Text:
        return Text(self.view.rows(), style="red" if self.view.errors else "")


class Download:
    """A bar for `liushui.loading`: called with bytes done, bytes in all, and what is being done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._tasks:
            if not self._console.is_terminal:
                self._console.print(f"{what} ({total / 1e6:,.0f} MB)", highlight=False, soft_wrap=True)
            self._tasks[what] = self._shown().add_task(what, total=total)
        self._shown().update(self._tasks[what], completed=done, total=total)

    def _shown(self) -> Progress:
        """The bar, which appears only when there is something to fetch."""
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
            self._bar.start()
        return self._bar
