"""A model's tokenizer as the engine uses it: text to ids and back, the end tokens, the chat template.

The only home of BOS: `encode` puts it in front where the model's files ask for it, `chat` leaves it to the template.
However many the text, the template and the user's words begin with, one is left. (Token ids are taken as they are.)
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from liushui.engine.chat_template import ChatTemplate
from liushui.engine.text import Vocabulary
from liushui.errors import ModelError, ParameterError

if TYPE_CHECKING:
    import tokenizers


class TokenizerSource(Protocol):
    """What is read of a checkpoint (see `liushui.loading.checkpoint`)."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special(self) -> dict[str, Any]: ...

    def tokenizer(self) -> "tokenizers.Tokenizer": ...


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer` (`raw`).

    `special` has the keys of `Checkpoint.special`; `chat_template` is Jinja source.
    """

    def __init__(
        self, raw: "tokenizers.Tokenizer", special: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        self.raw = raw
        self.bos_token_id: int | None = special.get("bos_token_id")
        self.eos_token_ids: tuple[int, ...] = tuple(special.get("eos_token_ids") or ())
        self.add_bos = bool(special.get("add_bos")) and self.bos_token_id is not None
        self.vocab_size: int = raw.get_vocab_size(with_added_tokens=True)
        """Number of tokens that have a text; the model's embedding may have more rows."""
        self.special_tokens = {
            name: token for name, token in special.items() if name.endswith("_token") and isinstance(token, str)
        }
        self._template = ChatTemplate(chat_template) if chat_template else None

    @classmethod
    def from_checkpoint(cls, checkpoint: TokenizerSource, chat_template: str | None = None) -> "Tokenizer":
        """`chat_template` replaces the model's own."""
        return cls(checkpoint.tokenizer(), checkpoint.special, chat_template or checkpoint.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it become themselves.

        `add_special_tokens`: begin with BOS if the model asks for it. (Nothing is ever put behind: an end token in
        front of the answer would end it.) Raises `ParameterError` for what is not text.
        """
        if not isinstance(text, str):
            raise ParameterError("prompt", f"must be text, got {type(text).__name__}")
        try:
            text.encode()  # tokenizers takes half of a surrogate pair for something that is no string
        except UnicodeEncodeError as error:
            raise ParameterError("prompt", f"is not valid Unicode: {error.reason} at {error.start}") from error
        ids: list[int] = self.raw.encode(text, add_special_tokens=False).ids
        if add_special_tokens and self.add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids[self._num_bos(ids) :]]
        return ids

    def _num_bos(self, ids: Sequence[int]) -> int:
        """How many BOS `ids` begin with."""
        return next((i for i, token in enumerate(ids) if token != self.bos_token_id), len(ids))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token have none. Bytes that are not UTF-8 become U+FFFD."""
        try:
            text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise ParameterError("token_ids", f"must be non-negative integers ({error})") from error
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: those of an incomplete character too. b"" for an id without a token."""
        return self._vocabulary.token_bytes(token_id)

    def id_to_text(self, token_id: int) -> str:
        """One token for display: its bytes as UTF-8, U+FFFD where they are none. Special tokens by their name."""
        return self._vocabulary.token_text(token_id)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.raw)

    @property
    def chat_template(self) -> str | None:
        return None if self._template is None else self._template.source

    @property
    def template_hash(self) -> str | None:
        """First 12 hexadecimal digits of the SHA-256 of the template; None without one."""
        return None if self._template is None else self._template.hash

    def apply_chat_template(
        self, /, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The conversation as the text of a prompt, as transformers' method of this name with `tokenize=False`.

        `kwargs` are the template's own variables (`tools`, `enable_thinking`, ...). Raises `ParameterError` naming the
        message or variable at fault, `ModelError` when there is no template or it fails.
        """
        return self._rendered(messages, add_generation_prompt, kwargs)

    def _rendered(self, messages: object, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        if self._template is None:
            raise ModelError(
                "the model brings no chat template: give one with --chat-template FILE, or send a prompt in text"
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            variables=variables,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """(text, token ids) of a conversation. What the template writes is all there is: it begins with BOS where it
        writes BOS, as in transformers, but never with two."""
        text = self._rendered(messages, add_generation_prompt, template_kwargs or {})
        ids = self.encode(text, add_special_tokens=False)
        return text, ids[max(self._num_bos(ids) - 1, 0) :]
