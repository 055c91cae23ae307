"""Rows out: one JSON object a line, whole or not at all, on disk as soon as its request ends."""

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liushui.cli.rows import BadRow, Row
from liushui.errors import LiushuiError

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What JSON allows in a string and some readers take for the end of a line."""


class OutputError(Exception):
    """Rows can no longer be written; the message says why and how many are safe."""


class RowWriter:
    """Appends rows to `path`, or to standard output where it is None.

    Each row is written straight to the file, so that rows that were written survive whatever happens to the
    process; a row that did not fit on the disk is cut off again, so that the file stays valid.
    """

    def __init__(self, path: Path | None, overwrite: bool = False, source: str | None = None) -> None:
        self.path = path
        self.count = 0
        self._fd: int | None = None
        if path is not None:
            self._check(path, overwrite, source)

    @property
    def name(self) -> str:
        return "standard output" if self.path is None else str(self.path)

    def open(self) -> None:
        """Create or empty the file. Kept apart from the checks so that a failed start destroys nothing."""
        if self.path is None:
            self._fd = sys.stdout.fileno()
            return
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise LiushuiError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        if self._fd is not None and self.path is not None:
            os.close(self._fd)
        self._fd = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises OutputError when the disk is full or the reader of a pipe went away."""
        if self._fd is None:
            raise RuntimeError("RowWriter.write() before open()")
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(LINE_ENDS)
        data = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")  # a lone surrogate becomes its escape
        done = 0
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            self._cut(done)
            raise OutputError(self._explain(error)) from None
        self.count += 1

    def _cut(self, partial: int) -> None:
        if partial and self._fd is not None and stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, max(0, os.lseek(self._fd, 0, os.SEEK_CUR) - partial))

    def _explain(self, error: OSError) -> str:
        rows = f"{self.count} rows are complete"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left for {self.name}; {rows}. Free some space, or choose another place with -o"
        if error.errno == errno.EPIPE:
            return f"whoever read {self.name} went away; {rows}"
        return f"cannot write {self.name}: {error.strerror}; {rows}"

    @staticmethod
    def _check(path: Path, overwrite: bool, source: str | None) -> None:
        if path.is_dir():
            raise LiushuiError(f"-o {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise LiushuiError(f"-o {path}: the folder {path.parent} does not exist. Make it: mkdir -p {path.parent}")
        if source is not None and path.exists() and path.samefile(source):
            raise LiushuiError(f"-o {path} is the file of prompts; choose another name")
        if path.is_file() and path.stat().st_size > 0 and not overwrite:
            raise LiushuiError(f"{path} exists already; choose another name, or say --overwrite")


def answer_row(row: Row, output: Any) -> dict[str, Any]:
    """The line for a finished request (`output` is a RequestOutput)."""
    if output.error is not None:
        return error_row(row, output.error)
    record = _head(row)
    record |= {"messages": row.messages} if row.messages is not None else {}
    record |= {"prompt": row.prompt} if row.prompt is not None else {}
    answers = [_answer(item) for item in output.outputs]
    if len(answers) == 1:
        record |= {key: value for key, value in answers[0].items() if key != "index"}
    else:
        record["outputs"] = answers
    record |= {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(item.token_ids) for item in output.outputs),
        "cached_tokens": output.num_cached_tokens,
        "truncated_tokens": output.truncated_tokens,
        "seed": output.effective_params.get("seed"),
        "timings": _timings(output.timings),
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_position(item) for item in output.prompt_logprobs]
    return record


def error_row(row: Row | BadRow, message: str) -> dict[str, Any]:
    """The line for a request that could not be answered."""
    return _head(row) | {"error": message}


def _head(row: Row | BadRow) -> dict[str, Any]:
    head: dict[str, Any] = {"index": row.index, "line": row.line}
    return head if row.custom_id is None else head | {"custom_id": row.custom_id}


def _answer(item: Any) -> dict[str, Any]:
    answer = {
        "index": item.index,
        "text": item.text,
        "token_ids": list(item.token_ids),
        "finish_reason": None if item.finish_reason is None else str(item.finish_reason),
    }
    if item.stop_reason is not None:
        answer["stop_reason"] = item.stop_reason
    if item.logprobs is not None:
        answer["cumulative_logprob"] = _number(item.cumulative_logprob)
        answer["logprobs"] = [
            {"token_id": token} | _position(position)
            for token, position in zip(item.token_ids, item.logprobs, strict=True)
        ]
    return answer


def _position(position: Mapping[int, Any] | None) -> dict[str, Any]:
    """The log-probabilities at one position: the most likely tokens, and the chosen one if it is not among them."""
    entries = sorted((position or {}).items(), key=lambda item: item[1].rank or 0)
    return {
        "top": [
            {"token_id": token, "token": entry.decoded_token, "logprob": _number(entry.logprob), "rank": entry.rank}
            for token, entry in entries
        ]
    }


def _number(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is not None and math.isfinite(value) else None


def _timings(timings: Any) -> dict[str, Any]:
    """Seconds, to the microsecond."""
    return {
        "queued": _seconds(timings.queued),
        "time_to_first_token": _seconds(timings.time_to_first_token),
        "total": _seconds(timings.total),
        "preemptions": timings.preemptions,
        "steps": timings.steps,
    }


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
