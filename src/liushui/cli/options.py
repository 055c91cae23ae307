"""Command-line flags made from the fields of `EngineConfig` and `SamplingParams`; a field is written once."""

import ast
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import typer

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError, ParameterError

HELP = {
    "n": "Answers per prompt; answer i uses seed + i.",
    "top_p": "Sample from the smallest set of tokens whose probabilities add up to this.",
    "min_p": "Drop tokens less likely than this fraction of the most likely one.",
    "presence_penalty": "Taken from the logit of every token that is in the answer already.",
    "frequency_penalty": "Taken from a token's logit for each time it is in the answer already.",
    "logit_bias": 'Added to logits, as JSON: {"token id": number}.',
    "stop": "End the answer at this text. May be repeated.",
    "stop_token_ids": "End the answer at this token id. May be repeated.",
    "ignore_eos": "Do not end at the model's end-of-sequence tokens.",
    "min_tokens": "No end-of-sequence or stop token before this many tokens.",
    "max_tokens": "Most tokens in an answer; 0: as many as fit.",
    "prompt_logprobs": "Log-probabilities of the prompt's tokens and of the k most likely.",
    "include_stop_str_in_output": "Keep the stop text in the answer.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "seed": "Seed of every prompt that brings none. Default: drawn, and written in each row.",
}
"""Where the words for a command line differ from the field's docstring, or the field explains itself."""

FLAG_TYPES: dict[str, Any] = {
    "stop": list[str],
    "stop_token_ids": list[int],
    "logit_bias": str | None,
    "served_names": list[str],
    "api_key": list[str],
}
"""Fields whose type a command line cannot say."""

METAVARS: dict[Any, str] = {
    int: "N",
    int | None: "N",
    float: "X",
    float | None: "X",
    str: "TEXT",
    str | None: "TEXT",
    list[str]: "TEXT",
    list[int]: "N",
}


@dataclass(frozen=True, slots=True)
class Group:
    """The flags of one settings class."""

    cls: type
    defaults: Mapping[str, Any]
    """Where this command's default is not the class's; such values are reported at start."""
    flags: Mapping[str, str]
    """field -> keyword of the flag, where the two differ."""
    skip: frozenset[str] = frozenset()

    def keyword(self, name: str) -> str:
        return self.flags.get(name, name)

    def flag(self, name: str) -> str:
        return "--" + self.keyword(name).replace("_", "-")

    def parameters(self) -> list[inspect.Parameter]:
        """Keyword-only parameters with the annotations that typer reads."""
        hints, docs = get_type_hints(self.cls), field_docs(self.cls)
        made = []
        for item in fields(self.cls):
            if item.name in self.skip:
                continue
            kind = FLAG_TYPES.get(item.name, hints[item.name])
            default = self.defaults.get(item.name, item.default)
            option = typer.Option(
                *self.option_names(item.name, kind, default),
                help=(HELP.get(item.name) if self.cls is SamplingParams else None) or docs.get(item.name),
                metavar=METAVARS.get(kind),
                show_default=not isinstance(default, bool | tuple | None),
            )
            made.append(
                inspect.Parameter(
                    self.keyword(item.name),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=[] if default in (None, ()) and kind in (list[str], list[int]) else default,
                    annotation=Annotated[kind, option],
                )
            )
        return made

    def option_names(self, name: str, kind: Any, default: Any) -> list[str]:
        """A switch that is on by default has a name that turns it off."""
        if kind is bool and default is True:
            return [f"{self.flag(name)}/--no-{self.flag(name)[2:]}"]
        return [self.flag(name)] + (["-m"] if name == "model" else [])

    def build(self, given: Mapping[str, Any], typed: Collection[str] = ()) -> Any:
        """The validated settings object from parsed flags; errors name the flag. `typed`: keywords of the flags that
        are on the command line, and not this command's defaults."""
        values = {
            item.name: given[self.keyword(item.name)] for item in fields(self.cls) if self.keyword(item.name) in given
        }
        for name in {"served_names", "api_key"} & set(values):
            values[name] = tuple(values[name])
        if values.get("max_tokens") == 0:
            values["max_tokens"] = None  # which a command line cannot say
        try:
            if isinstance(values.get("logit_bias"), str):
                values["logit_bias"] = _json_object("logit_bias", values["logit_bias"])
            made = self.cls(**values)
            if isinstance(made, SamplingParams):
                return made.giving(name for name in values if self.keyword(name) in typed)
            return made.validate()
        except ParameterError as error:
            raise self.named(error) from None

    def named(self, error: ParameterError) -> LiushuiError:
        """The same error in the words of the command line."""
        if error.field not in {item.name for item in fields(self.cls)}:
            return error
        return LiushuiError(f"{self.flag(error.field)}{str(error)[len(error.field) :]}")


def engine_group(skip: frozenset[str] = frozenset(), **defaults: Any) -> Group:
    """Flags of `EngineConfig`. `--seed` belongs to the sampling flags, so the engine's is `--engine-seed`."""
    return Group(EngineConfig, defaults, {"seed": "engine_seed"}, skip)


def sampling_group(skip: frozenset[str] = frozenset(), **defaults: Any) -> Group:
    """Flags of `SamplingParams`, with a command's own `defaults`."""
    return Group(SamplingParams, defaults, {}, skip)


def with_flags(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of `groups`; it receives the built objects, in order, before its own arguments."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[len(groups) :]
        keyword_only = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
        extra = [item for group in groups for item in group.parameters()]

        @wraps(command)
        def run(*, _context: typer.Context, **given: Any) -> None:
            typed = {name for name in given if getattr(_context.get_parameter_source(name), "name", "") != "DEFAULT"}
            built = [group.build(given, typed) for group in groups]
            command(*built, **{item.name: given[item.name] for item in own})

        context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [*keyword_only, *extra, context]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        del run.__wrapped__  # typer would read the annotations behind it
        return run

    return decorate


@lru_cache
def field_docs(cls: type) -> dict[str, str]:
    """field -> the string that follows it in the class's source."""
    try:
        tree = ast.parse(inspect.getsource(cls))
    except (OSError, TypeError):  # no source beside the package: flags without help texts
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for item, following in pairwise(body):
        match item, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = text
    return docs


def _json_object(name: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ParameterError(name, f"must be JSON, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise ParameterError(name, f"must be a JSON object, got {text!r}")
    return value
