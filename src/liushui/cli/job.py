"""One file of prompts through one engine: the loop behind `liushui generate` and `liushui demo`."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from liushui.cli.output import answer_row, error_row
from liushui.cli.rows import BadRow, Row
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError

Template = Literal["auto", "none"]


@dataclass(slots=True)
class Tally:
    """What became of the rows."""

    answered: int = 0
    failed: int = 0
    failed_lines: list[int] = field(default_factory=list)
    """The first few."""

    def failure(self, line: int) -> None:
        self.failed += 1
        if len(self.failed_lines) < 5:
            self.failed_lines.append(line)

    @property
    def done(self) -> int:
        return self.answered + self.failed


class Job:
    """Reads rows as the engine has room, answers them, and hands each finished row to `emit`."""

    def __init__(
        self,
        llm: Any,
        template: Template,
        emit: Callable[[dict[str, Any], bool], None],
        *,
        effective_params: bool = False,
    ) -> None:
        self.llm = llm
        self.tally = Tally()
        self.templated = template == "auto" and llm.tokenizer.template_hash is not None
        self._emit = emit
        self._effective_params = effective_params
        self._writing = threading.Lock()
        """Answers are written by the caller's thread, refusals by the one that reads the file."""
        self._rows: dict[int, Row] = {}
        self._params: deque[SamplingParams] = deque()

    def run(self, rows: Iterator[Row | BadRow], keep: Callable[[Row, Any], None] | None = None) -> Tally:
        """Answer all rows. `keep` sees each row with its RequestOutput. What `emit` raises ends the run."""
        with closing(self.llm.generate_iter(self._prompts(rows), self._sampling())) as outputs:
            for output in outputs:
                self._take(output, keep)
        return self.tally

    def run_at_once(self, rows: Iterator[Row | BadRow], keep: Callable[[Row, Any], None] | None = None) -> Tally:
        """As `run`, but all rows arrive at the same moment, so that waiting is measured from there."""
        engine = self.llm.engine
        now = engine.clock()
        for index, (prompt, params) in enumerate(zip(self._prompts(rows), self._sampling(), strict=True)):
            try:
                engine.submit(engine.prepare(prompt, params, now=now, index=index))
            except LiushuiError as error:
                self._refuse(self._rows.pop(index), str(error))
        while engine.has_unfinished:
            for output in engine.step():
                self._take(output, keep)
        return self.tally

    def _take(self, output: Any, keep: Callable[[Row, Any], None] | None) -> None:
        row = self._rows.pop(output.index)
        if keep is not None:
            keep(row, output)
        record = answer_row(row, output)
        if self._effective_params:
            record["effective_params"] = output.effective_params.explained()
            record["chat_template"] = self._template_of(row)
        if output.error is None:
            self.tally.answered += 1
        else:
            self.tally.failure(row.line)
        with self._writing:
            self._emit(record, output.error is not None)

    def _template_of(self, row: Row) -> str | None:
        """The hash of the template that made the row's prompt."""
        made = row.messages is not None or (self.templated and row.prompt is not None)
        return self.llm.tokenizer.template_hash if made else None

    def _refuse(self, row: Row | BadRow, message: str) -> None:
        self.tally.failure(row.line)
        with self._writing:
            self._emit(error_row(row, message), True)

    def _prompts(self, rows: Iterator[Row | BadRow]) -> Iterator[Any]:
        """Prompts for the engine, taken one by one; rows that cannot be prompts are reported on the way."""
        taken = 0
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    raise LiushuiError(row.message)
                prompt = self._prompt(row)
            except LiushuiError as error:
                self._refuse(row, str(error))
                continue
            self._rows[taken] = row
            self._params.append(row.params)
            taken += 1
            yield prompt

    def _sampling(self) -> Iterator[SamplingParams]:
        """The sampling parameters of the prompts, in the same order."""
        while self._params:
            yield self._params.popleft()

    def _prompt(self, row: Row) -> Any:
        if row.prompt_token_ids is not None:
            return row.prompt_token_ids
        if row.messages is not None:
            return self._render(row.messages)
        return self._render([{"role": "user", "content": row.prompt}]) if self.templated else row.prompt

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        _, ids = self.llm.tokenizer.chat(messages, add_generation_prompt=True, template_kwargs={})
        return list(ids)


@dataclass(frozen=True, slots=True)
class Load:
    """The engine at one moment."""

    running: int
    waiting: int
    tokens: int
    """Output tokens so far."""


class Meter:
    """The engine's load; output tokens are counted from its event log, each step once."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._seen = len(engine.log.steps)
        self._tokens = 0

    def __call__(self) -> Load:
        steps, scheduler = self._engine.log.steps, self._engine.scheduler
        count = len(steps)
        for number in range(self._seen, count):
            self._tokens += sum(item.samples for item in steps[number].items)
        self._seen = count
        return Load(scheduler.num_running, scheduler.num_waiting, self._tokens)
