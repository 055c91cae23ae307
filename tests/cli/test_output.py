"""Rows out: whole or not at all, and never over something precious."""

import errno
import json
import os
from pathlib import Path

import pytest

from liushui.cli.output import OutputError, RowWriter, answer_row, error_row
from liushui.cli.rows import BadRow, Row
from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimings
from liushui.errors import LiushuiError

ROW = Row(3, 5, SamplingParams(), custom_id="q", prompt="hi")


def output(**changes) -> RequestOutput:
    answer = CompletionOutput(0, "yes", [4, 5], FinishReason.STOP)
    fields = {
        "outputs": [answer],
        "timings": RequestTimings(1.0, 1.5, 2.0, 2.5, 3.0, steps=3),
        "effective_params": {"seed": 9},
    }
    return RequestOutput("req-0", 0, "hi", [1, 2, 3], **(fields | changes))


def write(path: Path, *rows: dict, **options) -> list[dict]:
    writer = RowWriter(path, **options)
    writer.open()
    for row in rows:
        writer.write(row)
    writer.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_back_as_they_went(tmp_path: Path):
    rows = [{"text": "流水席 \n \u2028"}, {"text": "\ud800"}]
    assert write(tmp_path / "out.jsonl", *rows) == rows


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(LiushuiError, match="--overwrite"):
        RowWriter(path)
    assert path.read_text() == "precious\n"
    RowWriter(path, overwrite=True)
    assert path.read_text() == "precious\n"  # only open() empties it
    assert write(path, {"a": 1}, overwrite=True) == [{"a": 1}]


def test_an_empty_file_holds_nothing_precious(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.touch()
    assert write(path, {"a": 1}) == [{"a": 1}]


def test_the_prompts_are_never_the_output(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text("x\n")
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(LiushuiError, match="file of prompts"):
        RowWriter(tmp_path / "link.jsonl", overwrite=True, source=str(path))


@pytest.mark.parametrize("name", ["", "no/such/folder/out.jsonl"])
def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path: Path, name: str):
    with pytest.raises(LiushuiError, match="folder"):
        RowWriter(tmp_path / name)


@pytest.mark.parametrize("partial", [0, 3])
def test_when_the_disk_is_full_the_rows_before_stay_whole(tmp_path: Path, monkeypatch, partial: int):
    path = tmp_path / "out.jsonl"
    writer = RowWriter(path)
    writer.open()
    writer.write({"a": 1})
    real, room = os.write, iter([partial] if partial else [])

    def full(fd: int, data: memoryview) -> int:
        count = next(room, None)
        if count is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:count])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match=r"no space left.*1 rows are complete"):
        writer.write({"b": 2})
    writer.close()
    assert path.read_text() == '{"a": 1}\n'


def test_dev_full_is_reported():
    writer = RowWriter(Path("/dev/full"))
    writer.open()
    with pytest.raises(OutputError, match="no space left for /dev/full; 0 rows are complete"):
        writer.write({"a": 1})
    writer.close()


def test_an_answer_in_a_row():
    assert answer_row(ROW, output()) == {
        "index": 3,
        "line": 5,
        "custom_id": "q",
        "prompt": "hi",
        "text": "yes",
        "token_ids": [4, 5],
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "truncated_tokens": 0,
        "seed": 9,
        "timings": {"queued": 0.5, "time_to_first_token": 1.0, "total": 2.0, "preemptions": 0, "steps": 3},
    }


def test_several_answers_are_a_list():
    answers = [CompletionOutput(i, str(i), [i], FinishReason.LENGTH, stop_reason=None) for i in range(2)]
    row = answer_row(ROW, output(outputs=answers))
    assert [(item["index"], item["text"]) for item in row["outputs"]] == [(0, "0"), (1, "1")]
    assert row["completion_tokens"] == 2
    assert "text" not in row


def test_logprobs_are_json_even_where_they_are_infinite():
    entry = {4: Logprob(-1.0, 2, "a"), 6: Logprob(-0.5, 1, "b")}
    never = {5: Logprob(float("-inf"), 9, "c")}
    answer = CompletionOutput(0, "yes", [4, 5], FinishReason.STOP, "x", [entry, never], float("-inf"))
    row = answer_row(ROW, output(outputs=[answer], prompt_logprobs=[None, entry, entry]))
    assert row["stop_reason"] == "x"
    assert row["logprobs"][0]["token_id"] == 4
    assert [item["token"] for item in row["logprobs"][0]["top"]] == ["b", "a"]
    assert row["logprobs"][1]["top"][0]["logprob"] is None
    assert len(row["prompt_logprobs"]) == 3
    json.dumps(row, allow_nan=False)


def test_an_error_in_a_row():
    assert error_row(BadRow(0, 1, "why"), "why") == {"index": 0, "line": 1, "error": "why"}
    refused = output(outputs=[], timings=None, error="prompt: too long")
    assert answer_row(ROW, refused) == {"index": 3, "line": 5, "custom_id": "q", "error": "prompt: too long"}
