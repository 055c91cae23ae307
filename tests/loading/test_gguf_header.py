"""A GGUF file is somebody else's: whatever is in it, the worst that happens is a ModelError."""

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liushui.errors import LiushuiError, ModelError
from liushui.loading import open_checkpoint
from liushui.loading.gguf_header import read_header
from tests.support.gguf_files import close

WIDTH = 32
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "c", "▁", "<0x0A>", "▁a", "<tool>"]


def write_small(path: Path, model: str = "gpt2") -> Path:
    """A whole little llama: metadata of every kind, quantised and plain tensors, a vocabulary, a template."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1, 1, 6, 1, 4])
    writer.add_token_scores([float(-i) for i in range(len(TOKENS))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("general.languages", ["en"])
    writer.add_float64("general.sampling.temp", 0.7)
    writer.add_bool("general.flag", True)
    writer.add_int64("general.number", -5)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    quants = gguf.GGMLQuantizationType
    add("token_embd.weight", len(TOKENS), WIDTH, kind=quants.Q8_0)
    add("output_norm.weight", WIDTH)
    add("blk.0.attn_norm.weight", WIDTH)
    add("blk.0.attn_q.weight", WIDTH, WIDTH, kind=quants.Q4_1)
    add("blk.0.attn_k.weight", WIDTH // 2, WIDTH, kind=quants.Q4_0)
    add("blk.0.attn_q.bias", WIDTH)
    add("blk.0.ffn_up.weight", WIDTH, WIDTH, kind=quants.BF16)
    add("blk.0.ffn_down.weight", WIDTH, WIDTH, kind=quants.F16)
    close(writer)
    return path


@cache
def small(model: str) -> bytes:
    with TemporaryDirectory() as folder:
        return write_small(Path(folder) / "m.gguf", model).read_bytes()


def use_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        assert checkpoint.load(name, torch.float32).shape == checkpoint.shape(name)
    assert checkpoint.tokenizer().encode("ab a\n <tool>c", add_special_tokens=False).ids
    assert checkpoint.describe()
    assert isinstance(checkpoint.special, dict)
    assert isinstance(checkpoint.generation_config, dict)
    assert checkpoint.chat_template is None or isinstance(checkpoint.chat_template, str)


def use_or_refuse(path: Path) -> str:
    """ "works", or the message of a LiushuiError; any other exception comes through."""
    try:
        use_everything(path)
    except LiushuiError as error:
        return str(error)
    return "works"


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = write_small(tmp_path / "m.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == theirs
    assert len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert ours.type.name == tensor.tensor_type.name
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_unharmed_file_works(tmp_path: Path, model: str) -> None:
    use_everything(write_small(tmp_path / "m.gguf", model))


Mutation = tuple[str, float, int]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "u32", "u64", "cut", "grow", "digit"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.integers(0, 255), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64 - 1])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[Mutation], span: int) -> bytes:
    """`span`: the front part where mutations fall (the header is where they hurt)."""
    raw = bytearray(data)
    for kind, where, value in mutations:
        at = int(where * min(span, len(raw)))
        if kind == "byte":
            raw[at] = value & 255
        elif kind == "u32" and at + 4 <= len(raw):
            raw[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == "u64" and at + 8 <= len(raw):
            raw[at : at + 8] = struct.pack("<Q", value)
        elif kind == "cut":
            del raw[int(where * len(raw)) :]
        elif kind == "grow":
            raw[at:at] = bytes(value % 9)
        elif kind == "digit":
            raw[at] ^= 1 << (value % 8)
        if not raw:
            break
    return bytes(raw)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS, everywhere=st.booleans())
def test_a_damaged_file_is_a_model_error_or_works(
    tmp_path: Path, model: str, mutations: list[Mutation], everywhere: bool
) -> None:
    data = small(model)
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated(data, mutations, len(data) if everywhere else 2600))
    assert use_or_refuse(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200))
def test_arbitrary_bytes_behind_a_true_beginning(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + tail)
    with pytest.raises(ModelError):
        open_checkpoint(path)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def text(value: bytes) -> bytes:
    return number(len(value)) + value


def file_with(kvs: list[bytes], tensors: list[bytes], data: bytes = b"\0" * 256, version: int = 3) -> bytes:
    head = b"GGUF" + number(version, 4) + number(len(tensors)) + number(len(kvs)) + b"".join(kvs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def entry(name: bytes = b"x", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(number(n) for n in shape)
    return text(name) + number(len(shape), 4) + dims + number(kind, 4) + number(offset)


KEY = text(b"key")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "magic": (b"GGML" + b"\0" * 60, "does not begin with GGUF"),
    "version 1": (file_with([], [], version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + b"\0" * 60, "big-endian"),
    "countless tensors": (b"GGUF" + number(3, 4) + number(2**60) + number(0) + b"\0" * 99, "counts"),
    "countless metadata": (b"GGUF" + number(3, 4) + number(0) + number(2**64 - 1) + b"\0" * 99, "counts"),
    "long key": (file_with([number(2**62)], []), "past the end"),
    "key not UTF-8": (file_with([text(b"\xff\xfe") + number(4, 4) + number(1, 4)], []), "not UTF-8"),
    "unknown value type": (file_with([KEY + number(99, 4)], []), "unknown type 99"),
    "nested array": (file_with([KEY + number(9, 4) + number(9, 4) + number(1)], []), "unsupported type 9"),
    "long array": (file_with([KEY + number(9, 4) + number(12, 4) + number(2**61)], []), "past the end"),
    "long strings": (file_with([KEY + number(9, 4) + number(8, 4) + number(2**61)], []), "past the end"),
    "string in array": (
        file_with([KEY + number(9, 4) + number(8, 4) + number(1) + number(2**63)], []),
        "past the end",
    ),
    "key twice": (file_with([KEY + number(0, 4) + b"\1"] * 2, []), "'key' occurs twice"),
    "alignment 0": (file_with([text(b"general.alignment") + number(4, 4) + number(0, 4)], []), "power of two"),
    "alignment 3": (file_with([text(b"general.alignment") + number(4, 4) + number(3, 4)], []), "power of two"),
    "alignment text": (file_with([text(b"general.alignment") + number(8, 4) + text(b"32")], []), "power of two"),
    "tensor type": (file_with([], [entry(kind=77)]), "'x' has the unknown type 77"),
    "dimensions": (file_with([], [entry(shape=(1,) * 9)]), "9 dimensions"),
    "no elements": (file_with([], [entry(shape=(0, 4))]), "shape"),
    "partial block": (file_with([], [entry(shape=(33,), kind=2)]), "no multiple of Q4_0's 32"),
    "too large": (file_with([], [entry(shape=(2**40, 2**40))]), "cut short"),
    "overflowing shape": (file_with([], [entry(shape=(2**63, 2**63, 2**63, 2**63))]), "cut short"),
    "far offset": (file_with([], [entry(offset=2**63)]), "cut short"),
    "unaligned": (file_with([], [entry(offset=8)]), "not aligned"),
    "tensor twice": (file_with([], [entry(), entry(offset=64)]), "occurs twice"),
    "overlap": (file_with([], [entry(shape=(16,)), entry(name=b"y", offset=32)]), "'x' and 'y' overlap"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    data, said = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=said) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_an_honest_hand_made_header(tmp_path: Path) -> None:
    """The hostile cases fail for the reason named, not because the frame around them is wrong."""
    path = tmp_path / "good.gguf"
    path.write_bytes(file_with([KEY + number(4, 4) + number(7, 4)], [entry(), entry(name=b"y", offset=32)]))
    header = read_header(path)
    assert header.metadata == {"key": 7}
    assert [(tensor.name, tensor.shape, tensor.nbytes) for tensor in header.tensors.values()] == [
        ("x", (8,), 32),
        ("y", (8,), 32),
    ]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_a_folder_or_nothing_instead_of_a_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(ModelError, match=str(path)):
        read_header(path)
