"""The tokenizer that a GGUF file's metadata describes, built as a `tokenizers.Tokenizer`.

Two kinds are known, by `tokenizer.ggml.model`:

* `gpt2`: byte-level BPE with a list of merges. How text is cut into words before merging is only named, by
  `tokenizer.ggml.pre`; the cuts themselves are those of the models' published tokenizer.json.
* `llama`: SentencePiece BPE. There are scores instead of merges: the best-scored piece is merged first, so the
  merges are every way to cut a piece in two, ordered by score (as Hugging Face's converter does it). Words begin
  with U+2581, and bytes outside the vocabulary become <0xNN> tokens.

Control tokens become special added tokens and user-defined tokens plain added tokens, both matched as they stand.
A beginning-of-sequence token is not added here: that is the engine's tokenizer's task alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from liushui.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _WORD % (("(?i:'s|'t|'re|'ve|'m|'ll|'d)?",) * 2 + (r"\p{N}{1,3}",))
_TEKKEN = _WORD % ("", "", r"\p{N}")


class _Pre(NamedTuple):
    """How a `tokenizer.ggml.pre` prepares text; `split` None stands for GPT-2's own pattern."""

    split: str | None = None
    digits: bool = False
    """Every digit is a word of its own."""
    nfc: bool = False
    ignore_merges: bool = False
    """A word that is a token is taken whole, even where the merges would not build it."""
    add_bos: bool = False
    """Whether BOS is added where the file does not say."""


_LLAMA3 = _Pre(_CL100K, ignore_merges=True, add_bos=True)
_PRES = (
    {name: _Pre() for name in ("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "roberta-bpe")}
    | {name: _Pre(digits=True) for name in ("smollm", "starcoder", "refact", "codeshell")}
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _LLAMA3)
    | {name: _Pre(_CL100K) for name in ("dbrx", "smaug-bpe")}
    | {name: _Pre(_QWEN2, nfc=True) for name in ("qwen2", "megrez")}
    | {
        "deepseek-r1-qwen": _Pre(_QWEN2),
        "tekken": _Pre(_TEKKEN, ignore_merges=True, add_bos=True),
        "gpt-4o": _Pre(_O200K),
    }
)


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether prompts begin with BOS: the file's flag, else what llama.cpp takes for this kind of tokenizer."""
    flag = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(flag, bool):
        return flag
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    name = metadata.get("tokenizer.ggml.pre", "default")
    return isinstance(name, str) and name in _PRES and _PRES[name].add_bos


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises `ModelError` for a kind that is not supported or a vocabulary that does not hold together."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"GGUF metadata 'tokenizer.ggml.model': {kind!r} is not supported (gpt2 and llama are)")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), default=1)
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)  # padding may repeat; the first is the one that counts
    try:
        tokenizer = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, vocab, types)
        _add_tokens(tokenizer, tokens, types, vocab)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"the tokenizer in the GGUF file does not hold together: {error}") from error
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = _PRES.get(name) if isinstance(name, str) else None
    if pre is None:
        raise ModelError(
            f"GGUF metadata 'tokenizer.ggml.pre': {name!r} is not known, so text cannot be split as the model "
            f"expects. Known: {', '.join(sorted(_PRES))}"
        )
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None)
    if pre.split is not None:
        cut = pre_tokenizers.Split(Regex(pre.split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    elif pre.digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    """Spaces become U+2581, and one is put before each stretch of text, as in the published tokenizer.json."""
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(types), default=None)
    unknown = next((token for token, index in vocab.items() if types[index] == _UNKNOWN), None)
    mergeable = {token: index for token, index in vocab.items() if types[index] not in (_UNKNOWN, _CONTROL)}
    model = BPE(
        vocab=vocab,
        merges=_merges(mergeable, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; among equals the longer left part first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        cuts: list[tuple[int, int, int]] = []
        for at in range(1, len(token)):
            left, right = vocab.get(token[:at]), vocab.get(token[at:])
            if left is not None and right is not None:
                cuts.append((left, right, at))
        score = scores[index]
        found.extend((-score, -at, at - len(token), token[:at], token[at:]) for _, _, at in sorted(cuts))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], vocab: Mapping[str, int]) -> None:
    """Marks the control and user-defined tokens; they keep the numbers they have."""
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not token or vocab[token] != index:
            continue
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ModelError(f"GGUF metadata {key!r} must be a list of strings")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: int | None) -> list[Any]:
    values = metadata.get(key, None if default is None else [default] * count)
    if not isinstance(values, list) or len(values) != count or isinstance(values[0], str):
        raise ModelError(f"GGUF metadata {key!r} must hold a number for each of the {count} tokens")
    return values
