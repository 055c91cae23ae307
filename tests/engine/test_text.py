"""Streamed pieces add up to the full decode: for any ids, any characters, any decoder."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from liushui.engine.text import ByteTextStream, TextStream, Vocabulary, WindowTextStream
from tests.engine import tiny_tokenizers as tk

BYTE_LEVEL = Vocabulary(tk.byte_level())
RAW = BYTE_LEVEL._raw
SENTENCEPIECE = Vocabulary(tk.sentencepiece_like())
METASPACE = Vocabulary(tk.sentencepiece_like(metaspace=True))
WORDPIECE = Vocabulary(tk.wordpiece())
OTHERS = {"sentencepiece": SENTENCEPIECE, "metaspace": METASPACE, "wordpiece": WORDPIECE}
ids = st.lists(st.integers(0, 345), max_size=40)  # beyond the vocabulary too: padded rows of the output matrix


def streamed(stream: TextStream, token_ids: list[int]) -> list[str]:
    return [stream.push(token) for token in token_ids] + [stream.flush()]


@given(ids, st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_random_ids(token_ids: list[int], skip: bool) -> None:
    """Random ids are mostly invalid UTF-8: the replacement characters must agree as well."""
    pieces = streamed(BYTE_LEVEL.stream(skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == RAW.decode(token_ids, skip_special_tokens=skip)


@given(st.text(max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_byte_level_real_text(text: str, skip: bool) -> None:
    token_ids = RAW.encode(text).ids
    pieces = streamed(BYTE_LEVEL.stream(skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == RAW.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces[:-1]).count("\ufffd") == text.count("\ufffd")  # nothing whole was shown broken


@pytest.mark.parametrize("name", OTHERS)
@given(ids, st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_other_decoders_random_ids(name: str, token_ids: list[int], skip: bool, data: st.DataObject) -> None:
    vocab = OTHERS[name]
    assert not vocab.byte_level
    pieces = streamed(vocab.stream(skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == vocab.decode(token_ids, skip_special_tokens=skip)


@given(ids, ids, st.booleans())
@example([259], [259], False)
@settings(max_examples=200, deadline=None)
def test_text_continues_the_prompt(prompt: list[int], token_ids: list[int], skip: bool) -> None:
    """A SentencePiece answer keeps the space between prompt and answer."""
    prompt = [token for token in prompt if not SENTENCEPIECE.is_byte_token(token)]
    stream = SENTENCEPIECE.stream(skip_special_tokens=skip, prompt_ids=prompt[-16:])
    text = "".join(streamed(stream, token_ids))
    both = SENTENCEPIECE.decode(prompt[-16:] + token_ids, skip_special_tokens=skip)
    assert SENTENCEPIECE.decode(prompt[-16:], skip_special_tokens=skip) + text == both


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦!", "你好，世界", "안녕하세요 여러분", "é", "🎉🎊"])
def test_characters_come_whole_and_early(text: str) -> None:
    """Each character is shown with the token that completes it, not later."""
    token_ids = RAW.encode(text).ids
    stream, shown = BYTE_LEVEL.stream(), ""
    for position, token in enumerate(token_ids):
        shown += stream.push(token)
        known = b"".join(BYTE_LEVEL.token_bytes(t) for t in token_ids[: position + 1])
        assert shown == known.decode("utf-8", "ignore")
    assert shown == text
    assert stream.flush() == ""


def test_stream_kind_follows_the_decoder() -> None:
    assert isinstance(BYTE_LEVEL.stream(), ByteTextStream)
    assert isinstance(WORDPIECE.stream(), WindowTextStream)
    assert Vocabulary(tk.byte_level()).byte_level


def test_special_tokens_are_hidden_or_shown() -> None:
    eos = RAW.token_to_id("<|eos|>")
    added = RAW.token_to_id("<tool call>")
    assert "".join(streamed(BYTE_LEVEL.stream(skip_special_tokens=True), [eos, added])) == "<tool call>"
    assert "".join(streamed(BYTE_LEVEL.stream(skip_special_tokens=False), [eos])) == "<|eos|>"
    assert BYTE_LEVEL.token_text(eos) == "<|eos|>"


def test_token_bytes_add_up() -> None:
    text = tk.SENTENCE[:120]
    assert b"".join(BYTE_LEVEL.token_bytes(t) for t in RAW.encode(text).ids) == text.encode()
    raw = SENTENCEPIECE._raw
    assert SENTENCEPIECE.token_bytes(raw.token_to_id("<0xE4>")) == b"\xe4"
    assert SENTENCEPIECE.token_text(raw.token_to_id("▁fox")) == " fox"
    assert SENTENCEPIECE.token_bytes(10**6) == b""


def test_byte_run_is_not_cut() -> None:
    """ByteFallback decodes a run of bytes as a whole or not at all: one bad byte spoils the good ones before it."""
    raw = SENTENCEPIECE._raw
    run = [raw.token_to_id(f"<0x{byte:02X}>") for byte in (0xE4, 0xBD, 0xA0, 0xFF)]
    stream = SENTENCEPIECE.stream()
    assert [stream.push(token) for token in run] == [""] * 4
    assert stream.flush() == "\ufffd" * 4
    good = SENTENCEPIECE.stream()
    assert [good.push(token) for token in [*run[:3], raw.token_to_id("fox")]] == ["", "", "", "你fox"]


def test_window_stays_short() -> None:
    """Blank tokens and long texts do not make the window grow: the work per token is constant."""
    raw = SENTENCEPIECE._raw
    stream = SENTENCEPIECE.stream()
    assert isinstance(stream, WindowTextStream)
    token_ids = [raw.token_to_id("fox"), *[raw.token_to_id("▁")] * 50, *[raw.token_to_id("▁the")] * 50]
    text = ""
    for token in token_ids:
        text += stream.push(token)
        assert len(stream._window) <= 4
    assert text + stream.flush() == SENTENCEPIECE.decode(token_ids)
