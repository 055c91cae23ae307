"""Prompts from files: every line with text is one row, good or bad, and says where it stood."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liushui.cli.rows import BadRow, Row, detect_form, read_rows
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError

DEFAULTS = SamplingParams(temperature=0, max_tokens=7)


def rows(text: str | bytes, form: str = "jsonl") -> list[Row | BadRow]:
    data = text.encode() if isinstance(text, str) else text
    return list(read_rows(iter(io.BytesIO(data)), form, DEFAULTS))


def only(text: str | bytes) -> Row | BadRow:
    (row,) = rows(text)
    return row


def test_a_text_file_has_a_prompt_a_line_and_blank_lines_do_not_count():
    found = rows("one\n\n  \ntwo words \r\nthree", form="txt")
    assert [(row.index, row.line, row.prompt) for row in found] == [
        (0, 1, "one"),
        (1, 4, "two words "),
        (2, 5, "three"),
    ]
    assert all(row.params == DEFAULTS for row in found)


def test_own_parameters_go_before_the_defaults():
    row = only('{"prompt": "a", "max_tokens": 3, "stop": ["x", "y"], "logit_bias": {"5": 1.5}, "custom_id": "q"}')
    assert (row.params.max_tokens, row.params.stop, row.params.temperature) == (3, ("x", "y"), 0)
    assert row.params.logit_bias == {5: 1.5}
    assert row.custom_id == "q"


def test_three_kinds_of_prompt():
    text = '{"prompt": ""}\n{"prompt_token_ids": [1, 2]}\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    plain, ids, chat = rows(text)
    assert plain.prompt == ""
    assert ids.prompt_token_ids == [1, 2]
    assert chat.messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[1]", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ("{}", "needs exactly one of prompt, prompt_token_ids, messages; got none"),
        ('{"prompt": "a", "messages": []}', "got prompt and messages"),
        ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' comes twice"),
        ('{"prompt": 5}', "prompt: must be a string"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt_token_ids": []}', "prompt_token_ids"),
        ('{"prompt_token_ids": [1, true]}', "must be integers"),
        ('{"prompt_token_ids": [1, null]}', "must be integers"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"content": "a"}]}', "messages[0]"),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "stop": 3}', "stop: must be"),
        ('{"prompt": "a", "stop": {"a": 1}}', "stop: must be"),
        ('{"prompt": "a", "stop_token_ids": false}', "stop_token_ids: must be"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_bad_line_becomes_a_row_that_says_why(line: str, words: str):
    good = '{"prompt": "x"}'
    before, bad, after = rows(f"{good}\n{line}\n{good}\n")
    assert isinstance(bad, BadRow)
    assert words in bad.message
    assert (bad.index, bad.line) == (1, 2)
    assert isinstance(before, Row)
    assert isinstance(after, Row)


def test_a_bad_row_keeps_its_custom_id():
    assert only('{"custom_id": 12, "prompt": 3}').custom_id == 12


def test_bytes_that_are_not_utf8_spoil_only_their_line():
    first, second = rows(b'{"prompt": "\xff"}\n{"prompt": "ok"}\n')
    assert first.message == "not UTF-8: byte 13 of the line is 0xff"
    assert second.prompt == "ok"


@given(st.lists(st.binary(max_size=40)), st.sampled_from(["txt", "jsonl"]))
def test_every_line_with_text_is_one_row_whatever_it_holds(parts: list[bytes], form: str):
    data = b"\n".join(parts)
    expected = [number for number, line in enumerate(io.BytesIO(data), 1) if line.strip()]
    found = rows(data, form)
    assert [row.line for row in found] == expected
    assert [row.index for row in found] == list(range(len(expected)))


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_arrives_as_it_was(text: str):
    assert only(json.dumps({"prompt": text})).prompt == text


@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("a.txt", b'{"prompt": "a"}\n', "txt"),
        ("a.jsonl", b"a\n", "jsonl"),
        ("a.NDJSON", b"a\n", "jsonl"),
        ("a", b"a\n", "txt"),
        ("-", b'\n  {"prompt": "a"}\n', "jsonl"),
        ("-", b"\nhello\n", "txt"),
        ("-", b"", "txt"),
    ],
)
def test_the_form_is_known_by_the_ending_or_for_standard_input_by_the_first_line(name: str, data: bytes, form: str):
    found, lines = detect_form(name, io.BytesIO(data))
    assert found == form
    assert b"".join(lines) == data


def test_a_byte_order_mark_is_no_part_of_the_first_prompt():
    form, lines = detect_form("a.txt", io.BytesIO(b"\xef\xbb\xbfhello\n"))
    assert [row.prompt for row in read_rows(lines, form, DEFAULTS)] == ["hello"]


def test_utf16_is_refused_with_a_remedy():
    with pytest.raises(LiushuiError, match="iconv"):
        detect_form("a.txt", io.BytesIO("hello\n".encode("utf-16")))
