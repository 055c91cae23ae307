"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers they were written from."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from liushui.errors import ModelError
from liushui.loading.gguf_header import read_header
from liushui.loading.gguf_tokenizer import adds_bos, build_tokenizer
from tests.support.gguf_files import write_model
from tests.support.tiny import oracle

CORPUS = [
    "The quick brown fox jumps over the lazy dog. I'm sure they'll say it's 1234567890 o'clock, don't you think?",
    "def f(x):\n    return x ** 2  # two   spaces\n\tfor i in range(10):\r\n\t\tprint(i)\n\n\n",
    "你好，世界！流水席不等人。 日本語のテキスト 안녕하세요 여러분 Привет мир naïve café Ünïcödé ①②③ ½ ٣٤",
    "👩‍👩‍👧‍👦 🎉🎊 🇨🇳 e\u0301 A\u030a  <|im_start|>user\nhello<|im_end|>\n",
    " https://example.com/?q=a+b&c=%20 a_b-c CamelCaseWORDS",
]
TRICKY = [
    *CORPUS,
    "",
    " ",
    "  ",
    "a  12 b",
    "  leading and trailing  ",
    "\n",
    "\n\n \n\t\n",
    " \n a",
    "12345",
    "1 22 333 4444",
    "x=1;y=22",
    "I'LL WE'VE it'S",
    "\u00a0\u3000wide\u2003spaces",
    "e\u0301 \u1e9b\u0323",
    "<|im_start|><|im_end|> <|im_start|>",
    "text<|im_start|>text <tool>x</tool>",
    "\x00\x01\x7f",
    "🏴\u200d☠\ufe0f" * 3,
    "ﷺ𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]


def trained(pre: Any, nfc: bool = False, **model: Any) -> Tokenizer:
    """A byte-level tokenizer with real merges; two control tokens first, a plain added one last."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def vocabulary(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    state = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def rebuilt(tmp_path: Path, metadata: dict[str, Any]) -> Tokenizer:
    path = write_model(tmp_path / "m.gguf", oracle("llama"), "llama", vocabulary=metadata)
    return build_tokenizer(read_header(path).metadata)


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


def split(pattern: str) -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_only])


# The patterns of the published tokenizer.json of Llama 3, Qwen2 and Mistral Nemo.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}"
    r"\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "make"),
    [
        ("gpt-2", lambda: trained(byte_level())),
        ("default", lambda: trained(byte_level())),
        ("smollm", lambda: trained(digits())),
        ("llama-bpe", lambda: trained(split(LLAMA3), ignore_merges=True)),
        ("qwen2", lambda: trained(split(QWEN2), nfc=True)),
        ("tekken", lambda: trained(split(TEKKEN), ignore_merges=True)),
    ],
)
def test_byte_level_kinds(tmp_path: Path, pre: str, make: Any) -> None:
    original = make()
    ours = rebuilt(tmp_path, vocabulary(original, pre))
    for text in TRICKY:
        expected = original.encode(text, add_special_tokens=False)
        got = ours.encode(text, add_special_tokens=False)
        assert got.ids == expected.ids, (text, got.tokens, expected.tokens)
        for skip in (True, False):
            assert ours.decode(got.ids, skip_special_tokens=skip) == original.decode(expected.ids, skip)
    assert ours.get_vocab() == original.get_vocab()
    flags = [(i, token.special) for i, token in sorted(ours.get_added_tokens_decoder().items())]
    assert flags == [(i, token.special) for i, token in sorted(original.get_added_tokens_decoder().items())]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "dbrx", "deepseek-r1-qwen", "gpt-4o"])
def test_same_as_transformers_on_the_same_file(tmp_path: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    original = trained(byte_level())
    ours = rebuilt(tmp_path, vocabulary(original, pre))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TRICKY:
        if pre == "llama-bpe" and not text.isascii():
            continue  # the published tokenizer takes whole words first (ignore_merges); theirs forgets it
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text


def test_an_added_token_outside_the_byte_alphabet(tmp_path: Path) -> None:
    metadata = vocabulary(trained(byte_level()), "gpt-2")
    metadata["tokens"].append("<｜begin▁of▁sentence｜>")
    metadata["token_type"].append(3)
    tokenizer = rebuilt(tmp_path, metadata)
    ids = tokenizer.encode("<｜begin▁of▁sentence｜>a").ids
    assert ids[0] == len(metadata["tokens"]) - 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<｜begin▁of▁sentence｜>a"


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    metadata = vocabulary(trained(byte_level()), "viking")
    with pytest.raises(ModelError, match="'viking' is not known"):
        rebuilt(tmp_path, metadata)
    with pytest.raises(ModelError, match=r"'tokenizer\.ggml\.model': 'rwkv' is not supported"):
        rebuilt(tmp_path, metadata | {"model": "rwkv"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merges": ["no such"]}, "does not hold together"),
        ({"token_type": [1]}, "token_type"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' must be a list of strings"),
        ({"model": "llama"}, "scores"),
    ],
)
def test_vocabularies_that_do_not_hold_together(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        rebuilt(tmp_path, vocabulary(trained(byte_level()), "gpt-2") | change)


SPM_WORDS = {
    "▁": -1.0,
    "▁t": -2.0,
    "he": -3.0,
    "▁the": -4.0,
    "in": -5.0,
    "▁a": -6.0,
    "an": -7.0,
    "▁an": -8.0,
    "nd": -9.0,
    "▁and": -10.0,
    "▁▁": -11.0,
    "er": -12.0,
    "▁the▁": -30.0,
}


def spm_vocabulary(**changes: Any) -> dict[str, Any]:
    """A SentencePiece BPE vocabulary: control tokens, bytes, pieces by falling score, letters, a user's token."""
    letters = sorted(set("the quick brown fox and nothing else,.!你é") - {" "})
    pieces = list(SPM_WORDS) + [letter for letter in letters if letter not in SPM_WORDS]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "<tool>"]
    types = [2, 3, 3, *([6] * 256), *([1] * len(pieces)), 4]
    scores = [0.0] * 259 + [SPM_WORDS.get(piece, -50.0 - i) for i, piece in enumerate(pieces)] + [0.0]
    base: dict[str, Any] = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    return base | {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes


def test_sentencepiece_by_hand(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, spm_vocabulary())

    def tokens(text: str) -> list[str]:
        return tokenizer.encode(text, add_special_tokens=False).tokens

    assert tokens("the and") == ["▁the", "▁and"]
    assert tokens(" the") == ["▁", "▁the"]  # a space is put in front of every text, also of one that has it
    assert tokens("z\n") == ["▁", "<0x7A>", "<0x0A>"]
    assert tokens("你好") == ["▁", "你", "<0xE5>", "<0xA5>", "<0xBD>"]
    assert tokens("the</s>the") == ["▁the", "</s>", "▁the"]
    assert tokens("the<tool>the") == ["▁the", "<tool>", "▁the"]
    assert tokens("") == []


def test_sentencepiece_and_back(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, spm_vocabulary())
    for text in ["the quick brown fox", "  two  spaces ", "z\n\n你好 👩‍👧", "é", " ", "a"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    tokenizer = rebuilt(tmp_path, spm_vocabulary(add_space_prefix=False))
    assert tokenizer.encode("the the", add_special_tokens=False).tokens == ["t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the", add_special_tokens=False).ids) == " the"


def test_sentencepiece_same_as_transformers(tmp_path: Path) -> None:
    """But for two things in which their reading of GGUF differs from the published tokenizers: text that begins with
    a space, and text behind a special token."""
    from transformers import AutoTokenizer

    ours = rebuilt(tmp_path, spm_vocabulary())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TRICKY, "the quick brown fox and nothing else", "another theranda in the end"]:
        if text.startswith((" ", "\u2581")) or "<tool>" in text:
            continue
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "smollm"}, False),
        ({"model": "gpt2", "pre": "smollm", "add_bos_token": True}, True),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "tekken"}, True),
        ({"model": "gpt2"}, False),
        ({"model": "gpt2", "pre": ["llama-bpe"]}, False),
    ],
)
def test_bos_where_the_file_does_not_say(metadata: dict[str, Any], expected: bool) -> None:
    assert adds_bos({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}) is expected
