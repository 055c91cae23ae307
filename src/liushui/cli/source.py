"""Where prompts come from: a file, or standard input."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from liushui.cli.rows import Form, count_rows, detect_form
from liushui.errors import LiushuiError


class Source:
    """An open file of prompts, looked at as far as its first line with text."""

    def __init__(self, name: str, form: Literal["auto", "txt", "jsonl"] = "auto") -> None:
        self.name = "standard input" if name == "-" else name
        self.path = None if name == "-" else Path(name)
        self._stream = self._open(name)
        try:
            detected, self.lines = detect_form(name, self._stream)
            self.form: Form = detected if form == "auto" else form
            self.total = self._count()
        except OSError as error:
            raise LiushuiError(f"cannot read {self.name}: {error.strerror}") from None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._stream.close()

    def __iter__(self) -> Iterator[bytes]:
        return self.lines

    def _count(self) -> int | None:
        """Rows to come; None where that cannot be known without reading all of it."""
        if self.path is None or not self.path.is_file():
            return None
        total = count_rows(self.path)
        if total == 0:
            raise LiushuiError(f"{self.name} holds no prompts: every line is blank")
        return total

    @staticmethod
    def _open(name: str) -> Any:
        if name == "-":
            if sys.stdin.isatty():
                print("reading prompts from the keyboard, one a line; Ctrl-D ends them", file=sys.stderr)
            return _standard_input()
        try:
            return Path(name).open("rb")
        except FileNotFoundError:
            raise LiushuiError(f"there is no file {name}. For standard input say -") from None
        except IsADirectoryError:
            raise LiushuiError(f"{name} is a folder; name a file of prompts in it") from None
        except OSError as error:
            raise LiushuiError(f"cannot read {name}: {error.strerror}") from None


def _standard_input() -> Iterable[bytes]:
    """Its lines as they come. Read without Python's buffer: the thread that reads may be left waiting for a line at the
    program's end, and Python does not end while somebody holds the buffer's lock."""
    try:
        fd = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: replaced by the program around us
        return sys.stdin.buffer
    return _lines(fd)


def _lines(fd: int) -> Iterator[bytes]:
    parts: list[bytes] = []  # of the line that has not ended yet
    while chunk := os.read(fd, 1 << 16):
        for piece in chunk.splitlines(keepends=True):
            parts.append(piece)
            if piece.endswith(b"\n"):
                yield b"".join(parts)
                parts.clear()
    if parts:
        yield b"".join(parts)
