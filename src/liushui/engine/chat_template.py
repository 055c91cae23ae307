"""Chat templates: Jinja source that turns a conversation into the text of a prompt.

The dialect is Hugging Face's (transformers, `apply_chat_template`): `trim_blocks` and `lstrip_blocks`, loop
controls, `tojson`, `raise_exception`, `strftime_now`, and a `generation` tag that only marks the assistant's part.
A template comes with a model, so it is not trusted: it runs in Jinja's immutable sandbox, sees plain JSON values
only, and its loops, repetitions and output are bounded.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from hashlib import sha256
from typing import Any, NoReturn

from liushui.errors import ModelError, ParameterError

MAX_OUTPUT = 1 << 24
"""Characters of a rendered prompt."""
MAX_ITERATIONS = 1_000_000
"""Numbers that all `range()` of one rendering may give together."""
MAX_REPEAT = 1 << 20
"""Items that `*` may make of a string or list, and bits that `**` may have."""
_MAX_DEPTH = 64
_RESERVED = frozenset({"messages", "add_generation_prompt", "range", "self"})


class ChatTemplate:
    """One template. `hash` identifies it in reports: the first 12 hexadecimal digits of its SHA-256."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.hash = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def render(
        self,
        messages: object,
        *,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `special_tokens`: {"bos_token": "<s>", ...}; `variables`: {"tools": [...], ...}.

        Raises `ParameterError` naming what is wrong with the messages or which variable the template does not use,
        and `ModelError` when the template itself fails.
        """
        import jinja2

        values: dict[str, Any] = {"tools": None, "documents": None, **(special_tokens or {})}
        values["messages"] = checked_messages(messages)
        values["add_generation_prompt"] = add_generation_prompt
        values["range"] = _bounded_range()
        template = self._template
        for name, value in (variables or {}).items():
            where = f"chat_template_kwargs.{name}"
            if name in _RESERVED or name in (special_tokens or {}):
                raise ParameterError(where, "is set by the engine")
            if value is not None and name not in self._variables:
                raise ParameterError(where, "this model's chat template has no such variable")
            values[name] = plain(value, where)
        try:
            return _joined(template.generate(values))
        except _Refused as error:
            raise ParameterError("messages", f"the model's chat template refuses them: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._failed(error) from error
        except (RecursionError, MemoryError) as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> ModelError:
        return ModelError(
            f"the chat template {self.hash} cannot render these messages ({type(error).__name__}: {error}); "
            "give another with --chat-template FILE"
        )

    @cached_property
    def _variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(self._environment.parse(self.source)))

    @cached_property
    def _environment(self) -> Any:
        return _make_environment()

    @cached_property
    def _template(self) -> Any:
        import jinja2

        try:
            return self._environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelError(
                f"the chat template {self.hash} is not valid Jinja ({error}); give another with --chat-template FILE"
            ) from error


def _make_environment() -> Any:
    """The sandbox. Jinja is imported here and not above: it takes 0.1 s, and a prompt in text needs none."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: the part between, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _too_large(operator, left, right):
                raise SecurityError(f"{operator} makes something too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Refused(Exception):
    """The template called raise_exception: it has no words for these messages."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _too_large(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        numbers = isinstance(left, int) and isinstance(right, int)
        return numbers and left.bit_length() * max(right, 0) > MAX_REPEAT
    for items, count in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(count, int):
            return len(items) * count > MAX_REPEAT
    return False


def _bounded_range() -> Any:
    """`range` for one rendering. Nested loops add up, which a bound on each alone would not see."""
    used = 0

    def bounded(*args: int) -> range:
        nonlocal used
        numbers = range(*args)
        used += len(numbers)
        if used > MAX_ITERATIONS:
            raise OverflowError(f"range() gave more than {MAX_ITERATIONS:,} numbers")
        return numbers

    return bounded


def _joined(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_OUTPUT:
            raise OverflowError(f"the prompt has more than {MAX_OUTPUT:,} characters")
        kept.append(piece)
    return "".join(kept)


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """The conversation as plain values, with text parts joined. Raises `ParameterError` naming `messages[i]...`."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError("messages", f"must be a list of objects with role and content, got {_kind(messages)}")
    if not messages:
        raise ParameterError("messages", "must hold at least one message")
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ParameterError(where, f"must be an object with role and content, got {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ParameterError(f"{where}.role", f'must be a string such as "user", got {_kind(role)}')
    checked: dict[str, Any] = plain(message, where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        checked["content"] = _joined_parts(content, f"{where}.content")
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ParameterError(f"{where}.content", f"must be a string or a list of text parts, got {_kind(content)}")
    return checked


def _joined_parts(parts: Sequence[object], where: str) -> str:
    """OpenAI's list of parts as one string, a line each."""
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text":
            raise ParameterError(f"{where}[{i}].type", f'must be "text" (the model reads text only), got {_kind(kind)}')
        if not isinstance(part.get("text"), str):
            raise ParameterError(f"{where}[{i}].text", f"must be a string, got {_kind(part.get('text'))}")
        texts.append(part["text"])
    return "\n".join(texts)


def plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy of JSON values only: a template must not reach the methods of other objects."""
    if depth > _MAX_DEPTH:
        raise ParameterError(where, f"is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ParameterError(where, f"must have strings as keys, got {_kind(key)}")
        return {str(key): plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ParameterError(where, f"must be a JSON value, got {_kind(value)}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.40} ({type(value).__name__})"
