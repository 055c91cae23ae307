"""The small files of a Hugging Face folder: JSON, tokenizer, chat template, special tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liushui.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_JSON = 1 << 28
"""Bytes. A tokenizer.json has tens of MB."""


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The JSON object in `path`; {} when it is missing and not required. Raises `ModelError` naming the file."""
    if not path.is_file():
        if not required:
            return {}
        raise ModelError(f"{path}: is missing; a model folder holds config.json, tokenizer.json and weights")
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(f"{path}: is too large for what it should hold")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not sound JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def read_tokenizer(folder: Path) -> "Tokenizer":
    """tokenizer.json, with the tokens that only tokenizer_config.json adds, and without truncation or padding."""
    from tokenizers import AddedToken, Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{path}: is missing. Make it from the model's older files with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a sound tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _tokenizer_settings(folder)
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for index, row in _added_rows(settings):
        content = row["content"]
        if content in known:
            continue
        flags = {key: bool(row[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in row}
        token = AddedToken(content, special=bool(row.get("special")), **flags)
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(content) != index:
            raise ModelError(
                f"{folder / 'tokenizer_config.json'}: token {content!r} should be number {index}, which does "
                "not follow from tokenizer.json"
            )
    named = {content for name in _NAMED if (content := _content(settings.get(name))) is not None}
    missing = [content for content in sorted(named) if content not in known or not known[content].special]
    # only tokens the model has: adding one would give it a number the weights do not know
    present = [content for content in missing if tokenizer.token_to_id(content) is not None]
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in present])
    return tokenizer


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    older = read_json(folder / "special_tokens_map.json", required=False)
    return older | read_json(folder / "tokenizer_config.json", required=False)


def _added_rows(settings: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    rows = settings.get("added_tokens_decoder")
    if not isinstance(rows, dict):
        return []
    return sorted(
        (int(index), row)
        for index, row in rows.items()
        if index.isdecimal() and isinstance(row, dict) and isinstance(row.get("content"), str)
    )


def _content(token: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the template in tokenizer_config.json ("default" where there are several)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
    template = read_json(folder / "tokenizer_config.json", required=False).get("chat_template")
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    if template is None:
        template = read_json(folder / "chat_template.json", required=False).get("chat_template")
    return template if isinstance(template, str) and template else None


def special_tokens(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: "Tokenizer"
) -> dict[str, Any]:
    """See `Checkpoint.special`. An answer ends at the tokenizer's end token, and at those of generation_config.json
    (or config.json, where the former names none)."""
    settings = _tokenizer_settings(folder)
    special: dict[str, Any] = {name: _content(settings.get(name)) for name in _NAMED}
    bos = _known(tokenizer, special["bos_token"])
    if bos is None and type(config.get("bos_token_id")) is int:
        bos = config["bos_token_id"]
        special["bos_token"] = tokenizer.id_to_token(bos) if 0 <= bos < 1 << 32 else None
    listed = generation.get("eos_token_id", config.get("eos_token_id"))
    named = [_known(tokenizer, special["eos_token"]), *(listed if isinstance(listed, list) else [listed])]
    ends = list(dict.fromkeys(end for end in named if type(end) is int and 0 <= end < 1 << 32))
    if special["eos_token"] is None and ends:
        special["eos_token"] = tokenizer.id_to_token(ends[0])
    special["bos_token_id"] = bos
    special["eos_token_ids"] = ends
    special["add_bos"] = bos is not None and _adds_bos(settings, tokenizer, bos)
    return special


def _known(tokenizer: "Tokenizer", token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def _adds_bos(settings: Mapping[str, Any], tokenizer: "Tokenizer", bos: int) -> bool:
    """The flag in tokenizer_config.json, else what the post-processor in tokenizer.json does."""
    flag = settings.get("add_bos_token")
    if isinstance(flag, bool):
        return flag
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    return tokenizer.encode("a").ids[:1] == [bos] and bare[:1] != [bos]
