"""Folders in Hugging Face's layout: whole and sharded weights, their tokenizer, and what is wrong with unsound ones."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, processors

from liushui.errors import LiushuiError, ModelError, WeightError
from liushui.loading import open_checkpoint
from liushui.loading.safetensors_files import read_header
from tests.engine.tiny_tokenizers import byte_level
from tests.support.tiny import oracle

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.scalar": torch.tensor(7, dtype=torch.int64),
}

BOS, EOS = {"bos_token": "<|bos|>"}, {"eos_token": "<|eos|>"}


def folder(path: Path, config: dict[str, Any] | None = None, tokenizer: Tokenizer | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write(path, "config.json", config if config is not None else {"architectures": ["LlamaForCausalLM"]})
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    return path


def write(path: Path, name: str, value: Any) -> None:
    (path / name).write_text(json.dumps(value), encoding="utf-8")


def whole(path: Path) -> Path:
    save_file(TENSORS, folder(path) / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    folder(path)
    names = list(TENSORS)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, part in files.items():
        save_file({name: TENSORS[name] for name in part}, path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    write(path, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return path


@pytest.mark.parametrize("make", [whole, sharded])
def test_tensors(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = open_checkpoint(make(tmp_path))
    assert checkpoint.format == "safetensors"
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.load(name, torch.float32), tensor.float())
        assert checkpoint.load(name, torch.bfloat16).dtype is torch.bfloat16
    files = 2 if make is sharded else 1
    assert checkpoint.describe() == f"safetensors F32, {files} file{'s' * (files > 1)}, 0 MiB"
    with pytest.raises(WeightError, match="no tensor 'd'"):
        checkpoint.load("d", torch.float32)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "40kB"])
def test_what_transformers_saves(tmp_path: Path, family: str, max_shard_size: str) -> None:
    model = oracle(family)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "40kB")
    assert checkpoint.config["architectures"] == [type(model).__name__]
    state = model.state_dict()
    assert set(checkpoint.names()) <= set(state)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.load(name, torch.float32), state[name]), name


def test_index_names_a_missing_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: is missing"):
        open_checkpoint(tmp_path)


def test_index_names_a_missing_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightError, match=r"holds no tensor 'c\.scalar'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 7])
def test_index_leads_out_of_the_folder(tmp_path: Path, file: object) -> None:
    sharded(tmp_path)
    write(tmp_path, "model.safetensors.index.json", {"weight_map": {"a.weight": file}})
    with pytest.raises(ModelError, match=r"'a\.weight' lies in .*no file of this folder"):
        open_checkpoint(tmp_path)


def test_a_tensor_the_index_forgets_is_still_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c.scalar": TENSORS["c.scalar"], "extra": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "extra" in open_checkpoint(tmp_path).names()


def header(table: dict[str, Any], data: int = 0) -> bytes:
    raw = json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def row(shape: list[Any], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not fit"),
    "short": (b"\x01\x02", "does not fit"),
    "header beyond the file": (struct.pack("<Q", 2**40) + b"{}", "does not fit"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "not sound JSON"),
    "deep JSON": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not sound JSON"),
    "a list": (header({})[:8].replace(b"\x02", b"\x02") + b"[]", "not a JSON object"),
    "twice": (struct.pack("<Q", 15) + b'{"x":{},"x":{}}', "occurs twice"),
    "no shape": (header({"x": {"dtype": "F32"}}), "'x' has no sound shape"),
    "negative": (header({"x": row([-1], [0, 4])}, 4), "'x' has no sound shape"),
    "float shape": (header({"x": row([1.0], [0, 4])}, 4), "'x' has no sound shape"),
    "dtype": (header({"x": row([1], [0, 1], "F4")}, 1), "'x' has the dtype 'F4'"),
    "wrong size": (header({"x": row([2], [0, 4])}, 4), r"'x': F32 \[2\] does not fill"),
    "backwards": (header({"x": row([1], [8, 4])}, 8), "'x': F32"),
    "huge": (header({"x": row([2**62, 2**62], [0, 4])}, 4), "'x': F32"),
    "overlap": (header({"x": row([2], [0, 8]), "y": row([1], [4, 8])}, 8), "'y' overlaps 'x'"),
    "gap": (header({"x": row([1], [0, 4]), "y": row([1], [8, 12])}, 12), "'y' leaves a gap after 'x'"),
    "cut short": (header({"x": row([4], [0, 16])}, 12), r"end at byte 16 \('x'\) of 12"),
    "late start": (header({"x": row([1], [4, 8])}, 8), "tensors end|damaged|cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    data, said = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=said) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def load_all(path: Path) -> str:
    """ "works", or the message of a LiushuiError; any other exception comes through."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            assert checkpoint.load(name, torch.float32).shape == checkpoint.shape(name)
    except LiushuiError as error:
        return str(error)
    return "works"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), keep=st.floats(0.5, 1))
def test_a_damaged_file_is_an_error_or_works(tmp_path: Path, where: float, value: int, keep: float) -> None:
    path = tmp_path / "model.safetensors"
    if not (tmp_path / "config.json").is_file():
        whole(tmp_path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "whole").read_bytes())
    raw[int(where * len(raw))] = value
    path.write_bytes(raw[: int(keep * len(raw))])
    assert load_all(tmp_path)


def test_configs_that_cannot_be_honoured(tmp_path: Path) -> None:
    whole(tmp_path)
    write(tmp_path, "config.json", {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ModelError, match="quantised with gptq"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(ModelError, match=r"config\.json: not sound JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "neither safetensors nor GGUF"),
        (["pytorch_model.bin"], "only pickled weights"),
        (["a.gguf", "b.gguf"], r"several GGUF files; give one: a\.gguf, b\.gguf"),
        (["a.safetensors", "b.safetensors", "config.json"], "no model.safetensors.index.json"),
    ],
)
def test_folders_without_a_model(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=said):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    whole(tmp_path)
    with pytest.raises(ModelError, match="give the folder it lies in"):
        open_checkpoint(tmp_path / "model.safetensors")


# -- the small files


def special(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    """`settings`: tokenizer_config.json; the keys `config` and `generation` are other files."""
    if "config" in settings:
        write(tmp_path, "config.json", settings.pop("config"))
    if "generation" in settings:
        write(tmp_path, "generation_config.json", settings.pop("generation"))
    write(tmp_path, "tokenizer_config.json", settings)
    return open_checkpoint(tmp_path).special


def test_special_tokens(tmp_path: Path) -> None:
    whole(tmp_path)
    found = special(tmp_path, **BOS, eos_token={"content": "<|eos|>"}, pad_token=None)
    assert found == {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "unk_token": None,
        "pad_token": None,
        "bos_token_id": 1,
        "eos_token_ids": [0],
        "add_bos": False,
    }


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, [0, 5, 6]),
        ({"eos_token_id": 5}, {}, [0, 5]),
        ({}, {"eos_token_id": 7}, [0, 7]),
        ({}, {"eos_token_id": [7, 0]}, [0, 7]),
        ({}, {"eos_token_id": None}, [0]),
        ({"eos_token_id": -1}, {}, [0]),
    ],
)
def test_end_tokens_of_all_files(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: list[int]
) -> None:
    whole(tmp_path)
    found = special(tmp_path, **EOS, generation=generation, config=config)
    assert found["eos_token_ids"] == expected


def test_ids_from_the_config_alone(tmp_path: Path) -> None:
    whole(tmp_path)
    found = special(tmp_path, config={"bos_token_id": 1, "eos_token_id": 0})
    assert (found["bos_token"], found["eos_token"]) == ("<|bos|>", "<|eos|>")


@pytest.mark.parametrize(
    ("flag", "template", "expected"),
    [
        (None, False, False),
        (None, True, True),
        (True, False, True),
        (False, True, False),
    ],
)
def test_bos_by_flag_or_by_post_processor(tmp_path: Path, flag: bool | None, template: bool, expected: bool) -> None:
    whole(tmp_path)
    tokenizer = byte_level()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {} if flag is None else {"add_bos_token": flag}
    assert special(tmp_path, **BOS, **settings)["add_bos"] is expected


def test_tokenizer_does_not_truncate_or_pad(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    whole(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = open_checkpoint(tmp_path).tokenizer().encode("the quick brown fox").ids
    assert ids == byte_level().encode("the quick brown fox").ids


def test_tokens_that_only_the_settings_add(tmp_path: Path) -> None:
    whole(tmp_path)
    size = byte_level().get_vocab_size()
    rows = {str(size): {"content": "<|new|>", "special": True}, str(size + 1): {"content": "<plain>", "special": False}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": rows})
    tokenizer = open_checkpoint(tmp_path).tokenizer()
    assert tokenizer.encode("<|new|><plain>").ids == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<plain>"
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<|new|>", "special": True}}})
    with pytest.raises(ModelError, match=r"'<\|new\|>' should be number 9"):
        open_checkpoint(tmp_path).tokenizer()


def test_an_end_token_is_special_even_if_tokenizer_json_forgets(tmp_path: Path) -> None:
    whole(tmp_path)
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    loaded = open_checkpoint(tmp_path).tokenizer()
    assert loaded.decode(loaded.encode("the<|im_end|>").ids) == "the"


def test_a_missing_or_unsound_tokenizer(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="not a sound tokenizer"):
        open_checkpoint(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        open_checkpoint(tmp_path).tokenizer()


def test_chat_templates_of_every_place(tmp_path: Path) -> None:
    whole(tmp_path)
    assert open_checkpoint(tmp_path).chat_template is None
    write(tmp_path, "chat_template.json", {"chat_template": "old"})
    assert open_checkpoint(tmp_path).chat_template == "old"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "of the list"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert open_checkpoint(tmp_path).chat_template == "of the list"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "of the settings"})
    assert open_checkpoint(tmp_path).chat_template == "of the settings"
    (tmp_path / "chat_template.jinja").write_text("of the file 你好", encoding="utf-8")
    assert open_checkpoint(tmp_path).chat_template == "of the file 你好"


def test_same_tokens_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=raw, **BOS, **EOS).save_pretrained(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    write(tmp_path, "config.json", {"model_type": "llama"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.special["add_bos"] is True
    for text in ["the quick", "", " <|eos|> x<tool call>y", "你好\n\n👩‍👩‍👧"]:
        ids = checkpoint.tokenizer().encode(text, add_special_tokens=False).ids
        assert [1, *ids] == theirs.encode(text), text
        assert checkpoint.tokenizer().decode(ids) == theirs.decode(ids, skip_special_tokens=True)
