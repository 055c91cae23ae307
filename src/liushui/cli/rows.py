"""Prompts from a file: one `Row` (or one `BadRow` that says what is wrong with it) per line, read as needed."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError, ParameterError

Form = Literal["txt", "jsonl"]
SOURCES = ("prompt", "prompt_token_ids", "messages")
KEYS = (*SOURCES, "custom_id", *SamplingParams.names())
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the file. Exactly one of prompt, prompt_token_ids and messages is set."""

    index: int
    """Place among the rows of the file, from 0; blank lines do not count."""
    line: int
    """Line in the file, from 1."""
    params: SamplingParams
    custom_id: Any = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be a request, and why."""

    index: int
    line: int
    message: str
    custom_id: Any = None


class RowError(Exception):
    """What is wrong with a row."""


def detect_form(name: str, stream: Iterable[bytes]) -> tuple[Form, Iterator[bytes]]:
    """The form by the file's ending; standard input ("-") is JSONL if its first line with text opens a `{`.

    Returns the form and all lines, those looked at included. Raises LiushuiError for UTF-16 and UTF-32.
    """
    lines = iter(stream)
    seen: list[bytes] = []
    for line in lines:
        seen.append(line)
        if line.strip():
            break
    start = b"".join(seen[:1])
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise LiushuiError(f"{name} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8")
    if start.startswith(BOM):
        seen[0] = start[len(BOM) :]
    suffix = Path(name).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        form: Form = "jsonl"
    elif name == "-" and seen and seen[-1].lstrip().startswith(b"{"):
        form = "jsonl"
    else:
        form = "txt"
    return form, _chain(seen, lines)


def read_rows(lines: Iterator[bytes], form: Form, defaults: SamplingParams) -> Iterator[Row | BadRow]:
    """Parse lines into rows. A row's own sampling parameters go before `defaults`."""
    index = 0
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        custom_id = None
        try:
            text = _decode(raw)
            if form == "txt":
                yield Row(index, number, defaults, prompt=text)
            else:
                record = _object(text)
                custom_id = record.get("custom_id")
                yield _row(index, number, record, defaults)
        except (RowError, ParameterError) as error:
            yield BadRow(index, number, str(error), custom_id)
        index += 1


def count_rows(path: Path) -> int:
    """How many rows a file will give: its lines that are not blank."""
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _chain(seen: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from seen
    yield from rest


def _decode(raw: bytes) -> str:
    try:
        return raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise RowError("not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RowError(f"must be a JSON object with one of {', '.join(SOURCES)}, got {_kind(record)}")
    return record


def _row(index: int, line: int, record: dict[str, Any], defaults: SamplingParams) -> Row:
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise RowError(f"unknown key {', '.join(map(repr, unknown))}; known keys: {', '.join(KEYS)}")
    given = [key for key in SOURCES if key in record]
    if len(given) != 1:
        what = " and ".join(given) if given else "none"
        raise RowError(f"needs exactly one of {', '.join(SOURCES)}; got {what}")
    source, value = given[0], record[given[0]]
    CHECKS[source](value)
    return Row(index, line, _params(record, defaults), record.get("custom_id"), **{source: value})


def _params(record: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    own = {key: value for key, value in record.items() if key in SamplingParams.names()}
    if "stop" in own and not isinstance(own["stop"], str | list | None):
        raise ParameterError("stop", f"must be a string or a list of strings, got {_kind(own['stop'])}")
    if "stop_token_ids" in own and not isinstance(own["stop_token_ids"], list | None):
        raise ParameterError("stop_token_ids", f"must be a list of token ids, got {_kind(own['stop_token_ids'])}")
    return defaults.replaced(**own)


def _check_prompt(value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"prompt: must be a string, got {_kind(value)}")
    _check_text("prompt", value)


def _check_ids(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise RowError(f"prompt_token_ids: must be a list of token ids, not empty, got {_kind(value)}")
    wrong = next((item for item in value if isinstance(item, bool) or not isinstance(item, int)), None)
    if wrong is not None or None in value:
        raise RowError(f"prompt_token_ids: must be integers, got {wrong!r}")


def _check_messages(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise RowError(f"messages: must be a list of messages, not empty, got {_kind(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"messages[{number}]: must be an object with role and content")
        if not isinstance(message.get("content"), str):
            raise RowError(f"messages[{number}].content: must be a string, got {_kind(message.get('content'))}")
        _check_text(f"messages[{number}].content", message["content"])


CHECKS = {"prompt": _check_prompt, "prompt_token_ids": _check_ids, "messages": _check_messages}


def _check_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name}: half of a surrogate pair at character {error.start + 1}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise RowError(f"the key {twice!r} comes twice")
    return record


def _no_constant(name: str) -> Any:
    raise RowError(f"not JSON: {name} is not a JSON number")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return "a string" if value else "an empty string"
        case int() | float():
            return f"the number {value}"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"
