"""Log-probabilities in the two shapes of the OpenAI API.

chat            {"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}, ...]}
completions     {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{...}, ...], "text_offset": [...]}

A token that is not UTF-8 by itself is written as its bytes: "bytes:\\xe4\\xbd", as OpenAI does, so that two such tokens
are never the same key.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from liushui.engine.outputs import TokenLogprob
from liushui.engine.text import Vocabulary
from liushui.server.pieces import Rows, parts

_Array = Callable[[Sequence[int], Sequence[TokenLogprob | None]], list[Any]]

LOWEST = -9999.0
"""JSON has no infinities; OpenAI writes this."""


class Words:
    """How tokens are written."""

    def __init__(self, vocabulary: Vocabulary, as_ids: bool) -> None:
        """`as_ids`: "token_id:123" instead of the text (`return_tokens_as_token_ids`)."""
        self._vocabulary = vocabulary
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._vocabulary.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token_id: int) -> list[int]:
        return list(self._vocabulary.token_bytes(token_id))


def number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


def top_entries(entry: TokenLogprob, top: int) -> list[tuple[int, float]]:
    """(token id, log-probability) of the `top` most likely, best first."""
    ranked = sorted(((found.rank, token_id, found.logprob) for token_id, found in entry.items()))
    return [(token_id, logprob) for rank, token_id, logprob in ranked if rank <= top][:top]


def chat_content(words: Words, token_ids: Sequence[int], entries: Sequence[TokenLogprob], top: int) -> list[Any]:
    """OpenAI's `logprobs.content` of these tokens."""
    return [
        {
            "token": words(token_id),
            "logprob": number(entry[token_id].logprob),
            "bytes": words.bytes(token_id),
            "top_logprobs": [
                {"token": words(other), "logprob": number(logprob), "bytes": words.bytes(other)}
                for other, logprob in top_entries(entry, top)
            ],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]


def chat_rows(words: Words, token_ids: Sequence[int], entries: Sequence[TokenLogprob], top: int) -> Rows:
    """The same of a whole answer, made while it is written."""
    return Rows(chat_content(words, token_ids[part], entries[part], top) for part in parts(len(token_ids), top))


class LegacyLogprobs:
    """The arrays of one choice, also piece by piece: offsets go on where the last piece ended."""

    def __init__(self, words: Words, vocabulary: Vocabulary, top: int, *, skip_special_tokens: bool) -> None:
        self._words = words
        self._top = top
        self._text = vocabulary.stream(skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def piece(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """The arrays for these tokens. An entry is None where nothing predicts the token: the first of a prompt."""
        return {name: make(token_ids, entries) for name, make in self._arrays().items()}

    def rows(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Rows]:
        """The same of all tokens of a choice, made while they are written."""
        places = list(parts(len(token_ids), self._top))

        def array(make: _Array) -> Rows:
            return Rows(make(token_ids[part], entries[part]) for part in places)

        return {name: array(make) for name, make in self._arrays().items()}

    def _arrays(self) -> dict[str, _Array]:
        return {
            "tokens": lambda ids, entries: [self._words(token_id) for token_id in ids],
            "token_logprobs": lambda ids, entries: [
                None if entry is None else number(entry[token_id].logprob)
                for token_id, entry in zip(ids, entries, strict=True)
            ],
            "top_logprobs": lambda ids, entries: [
                None if entry is None else self._most_likely(token_id, entry)
                for token_id, entry in zip(ids, entries, strict=True)
            ],
            "text_offset": lambda ids, entries: [self._place(token_id) for token_id in ids],
        }

    def _place(self, token_id: int) -> int:
        """Where the next token begins: it is this one."""
        offset = self._offset
        self._offset += len(self._text.push(token_id))
        return offset

    def _most_likely(self, token_id: int, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one, best first. Of two that are written alike the better."""
        found = top_entries(entry, self._top)
        if all(other != token_id for other, _ in found):
            found.append((token_id, entry[token_id].logprob))
        likely: dict[str, float] = {}
        for other, logprob in found:
            likely.setdefault(self._words(other), number(logprob))
        return likely


def by_token_id(words: Words, entries: Sequence[TokenLogprob | None], top: int) -> Rows:
    """vLLM's `prompt_logprobs`: one object per prompt token, by token id; null for the first. Made while written."""
    return Rows(
        [None if entry is None else _by_token_id(words, entry) for entry in entries[part]]
        for part in parts(len(entries), top)
    )


def _by_token_id(words: Words, entry: TokenLogprob) -> dict[str, dict[str, Any]]:
    return {
        str(token_id): {"logprob": number(found.logprob), "rank": found.rank, "decoded_token": words(token_id)}
        for token_id, found in entry.items()
    }
