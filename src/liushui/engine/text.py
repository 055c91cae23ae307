"""Token ids to text, incrementally, so that the pieces always add up to the whole.

The truth is `tokenizers.Tokenizer.decode(all ids)`. A stream emits text only once no later token can change it,
and its pieces concatenate to exactly that string, wherever a character, an emoji or a space was split:

    byte-level (GPT-2, Llama 3, Qwen, SmolLM2): every token is a byte string and the text is the UTF-8 decoding
        of their concatenation, so an incremental UTF-8 decoder is exact; a tail that is not UTF-8 is flushed
        as U+FFFD, one per maximal invalid subpart, as in Unicode chapter 3.9 and the full decode.
    anything else (SentencePiece, WordPiece): such decoders treat each token alone, except for the very first
        one (which loses its leading space) and for runs of byte tokens <0xE4> (valid as a whole or not at all).
        So decode a short window behind an anchor token and show what it adds, never cutting a byte run.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
_ANCHOR_TOKENS = 4
_PROMPT_TAIL = 16


class RawTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that turns ids into text."""

    @property
    def decoder(self) -> Any: ...

    def id_to_token(self, id: int) -> str | None: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def get_added_tokens_decoder(self) -> dict[int, Any]: ...


class TextStream(Protocol):
    """The text of one sequence as its tokens come."""

    def push(self, token_id: int) -> str:
        """Text that this token makes certain; may be empty."""
        ...

    def flush(self) -> str:
        """What is left at the end, invalid UTF-8 as U+FFFD."""
        ...


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable alphabet: bytes that are visible in Latin-1 stand for themselves, others for U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in set(visible))
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


class Vocabulary:
    """Text of token ids for one `tokenizers.Tokenizer`. Unknown ids have no text, as in its `decode`."""

    def __init__(self, raw: RawTokenizer) -> None:
        self._raw = raw
        self.byte_level = _decoder_types(raw.decoder) == ["ByteLevel"]
        added = raw.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Text of what follows `prompt_ids`: prompt text + streamed text = the decode of both together
        (byte-level models need no prompt for that; SentencePiece would lose the space in between)."""
        if self.byte_level:
            return ByteTextStream(self, skip_special_tokens)
        return WindowTextStream(self, skip_special_tokens, prompt_ids)

    def token_text(self, token_id: int) -> str:
        """The token on its own, special or not, for display beside its log-probability."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes: exact for byte-level models and byte tokens, else the UTF-8 of its text."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def hidden(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether `decode` passes over this id."""
        if skip_special_tokens and token_id in self.special_ids:
            return True
        return self._raw.id_to_token(token_id) is None

    def is_byte_token(self, token_id: int) -> bool:
        return _fallback_byte(self._raw.id_to_token(token_id) or "") is not None

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token with a space or the like: written as it is
                return token.encode()
        byte = _fallback_byte(token)
        if byte is not None:
            return bytes([byte])
        text = self.decode([token_id], skip_special_tokens=False)
        if token.startswith("▁") and not text.startswith(" "):  # stripped as if it began the text
            text = " " + text
        return text.encode()


class ByteTextStream:
    """Byte-level text: O(1) per byte, exact."""

    __slots__ = ("_decoder", "_skip", "_vocab")

    def __init__(self, vocab: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocab = vocab
        self._skip = vocab.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._decoder.decode(self._vocab.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowTextStream:
    """Text of any other decoder, by decoding an anchor and the tokens not yet shown."""

    __slots__ = ("_shown", "_skip", "_vocab", "_window")

    def __init__(self, vocab: Vocabulary, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()) -> None:
        self._vocab = vocab
        self._skip = skip_special_tokens
        self._window = self._anchor(prompt_ids)
        self._shown = len(self._decode(self._window))

    def push(self, token_id: int) -> str:
        if self._vocab.hidden(token_id, self._skip):
            return ""
        self._window.append(token_id)
        if self._vocab.is_byte_token(token_id):
            return ""
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):  # perhaps half a character
            return ""
        delta = text[self._shown :]
        self._shown = len(text)
        self._advance()
        return delta

    def flush(self) -> str:
        delta = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return delta

    def _advance(self) -> None:
        """Shorten the window to its last tokens, if they are enough to absorb what is special about the first."""
        for size in range(1, min(_ANCHOR_TOKENS, len(self._window) - 1) + 1):
            tail = self._window[-size:]
            if self._vocab.is_byte_token(tail[0]):
                return
            if text := self._decode(tail):
                self._window, self._shown = tail, len(text)
                return

    def _anchor(self, prompt_ids: Sequence[int]) -> list[int]:
        """The shortest end of the prompt that shows something; all of a prompt that shows nothing. Bytes at its very
        end are left out: an answer does not complete the prompt's last character."""
        tail = [token for token in prompt_ids[-_PROMPT_TAIL:] if not self._vocab.hidden(token, self._skip)]
        while tail and self._vocab.is_byte_token(tail[-1]):
            tail.pop()
        for size in range(1, len(tail) + 1):
            if not self._vocab.is_byte_token(tail[-size]) and self._decode(tail[-size:]):
                return tail[-size:]
        return tail

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocab.decode(list(ids), skip_special_tokens=self._skip)


def _fallback_byte(token: str) -> int | None:
    """0xE4 of the SentencePiece byte token "<0xE4>", else None."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _decoder_types(decoder: Any) -> list[str]:
    """Types of the decoder chain, innermost list flattened, from its own description."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    chain = state["decoders"] if state["type"] == "Sequence" else [state]
    return [part["type"] for part in chain]
