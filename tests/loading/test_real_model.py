"""The default model as it comes: the same tokens, text and tensors as transformers reads from the same file."""

from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from liushui.loading import Checkpoint, open_checkpoint
from tests.loading.test_gguf_tokenizer import TRICKY
from tests.support.gguf_files import interleaved

pytestmark = pytest.mark.real_model

TEXTS = [
    *TRICKY,
    "The capital of France is",
    "x  1",  # a run of spaces before a digit: cut between them by SmolLM2's own tokenizer
    "3.14159 and 2,718,281  828",
    "<|endoftext|> <|im_start|>system\nHi<|im_end|>\n<jupyter_code>print(1)<empty_output>",
    "if (a[0] == '\\n') { return ++i; } // café\n" * 3,
    "\u200b\u200c\ufeff mixed \u202eRTL שלום مرحبا",
    "🤷🏽‍♀️" * 5,
]


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path) -> Checkpoint:
    return open_checkpoint(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Tokenizer:
    """transformers' tokenizer of the file. It passes over `pre = smollm`, so what SmolLM2's tokenizer.json says of
    splitting is put back: every digit alone, then GPT-2's pattern."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).backend_tokenizer
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return backend


def test_tokenizer(checkpoint: Checkpoint, theirs: Tokenizer) -> None:
    ours = checkpoint.tokenizer()
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        for skip in (True, False):
            assert ours.decode(expected, skip_special_tokens=skip) == theirs.decode(expected, skip), text
    assert ours.get_vocab() == theirs.get_vocab()
    special = {i for i, token in ours.get_added_tokens_decoder().items() if token.special}
    assert special == {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}


def test_facts(checkpoint: Checkpoint) -> None:
    assert checkpoint.describe() == "GGUF Q4_1, 94 MiB"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.config["tie_word_embeddings"] is True
    assert (checkpoint.config["rms_norm_eps"], checkpoint.config["rope_theta"]) == (1e-05, 100000.0)
    assert checkpoint.special == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "add_bos": False,
    }
    assert "<|im_start|>" in (checkpoint.chat_template or "")
    assert len(checkpoint.names()) == 272


def decoded(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The tensor in the file's own layout, by the gguf package."""
    tensor = checkpoint._tensors[name][0]  # type: ignore[attr-defined]
    with checkpoint.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.nbytes), np.uint8).reshape(*tensor.shape[:-1], -1)
    values = raw.view(np.float32) if tensor.type.name == "F32" else raw
    return gguf.quants.dequantize(values, gguf.GGMLQuantizationType[tensor.type.name]).reshape(tensor.shape)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ],
)
def test_tensors_as_the_gguf_package_decodes_them(checkpoint: Checkpoint, name: str, stored: str) -> None:
    assert checkpoint._tensors[name][0].name == stored  # type: ignore[attr-defined]
    assert np.array_equal(checkpoint.load(name, torch.float32).numpy(), decoded(checkpoint, name))


@pytest.mark.parametrize(("kind", "heads"), [("q", 9), ("k", 3)])
def test_rotary_rows_put_back_are_those_of_the_file(checkpoint: Checkpoint, kind: str, heads: int) -> None:
    name = f"model.layers.3.self_attn.{kind}_proj.weight"
    loaded = checkpoint.load(name, torch.float32).numpy()
    assert np.array_equal(interleaved(loaded, heads), decoded(checkpoint, name))
    assert not np.array_equal(loaded, decoded(checkpoint, name))
