"""`Visit`: one HTTP request on its way through the server, and the line of log it leaves."""

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from liushui.engine.serving import AnswerStream
from liushui.server.keys import Key

LOG = logging.getLogger("liushui.server")
VISIT = "liushui.visit"
"""Key of the ASGI scope."""


@dataclass(slots=True)
class Visit:
    """Who asked for what, and what came of it. Never the text of a prompt or an answer."""

    request_id: str
    method: str
    path: str
    key: Key
    started: float
    """Monotonic seconds."""
    max_body: int
    """Bytes."""
    body_timeout: float
    write_timeout: float
    status: int = 0
    code: str | None = None
    """Of the error, if it was one."""
    timings: bool = False
    """Whether the answer is to say where its time went."""
    caller: dict[str, list[str]] | None = None
    """Headers that say whose trace it belongs to; None: it was not let in."""
    streams: list[AnswerStream] = field(default_factory=list)
    """Its prompts, once they are accepted."""
    facts: dict[str, Any] = field(default_factory=dict)
    """model, the answer's id, tokens, finish reasons: what the endpoint knows."""

    def record(self) -> dict[str, Any]:
        """The line of log."""
        record: dict[str, Any] = {
            "request_id": self.request_id,
            "key": self.key.name or None,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 6),
            "code": self.code,
            **self.facts,
        }
        return {name: value for name, value in record.items() if value is not None}


class LineFormatter(logging.Formatter):
    """One line per record: JSON, or words for a person."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._json:
            line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
            return json.dumps(line | facts | ({"trace": trace} if trace else {}), ensure_ascii=False, default=str)
        words = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return " ".join(part for part in (stamp, record.getMessage(), words) if part) + (f"\n{trace}" if trace else "")


def set_up_logging(as_json: bool) -> None:
    """Send the server's log to standard error, one line a record."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(as_json))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
