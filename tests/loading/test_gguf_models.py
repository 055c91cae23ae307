"""Models written as llama.cpp writes them come back under Hugging Face's names, in its layout, with its config."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from liushui.config import EngineConfig
from liushui.errors import ModelError, WeightError
from liushui.loading import Checkpoint, open_checkpoint
from liushui.runner.runner import Runner
from tests.support import tiny
from tests.support.gguf_files import close, interleaved, write_model
from tests.support.tiny import oracle

FAMILIES = {
    "llama": "llama",
    "llama-tied": "llama",
    "llama-bias": "llama",
    "mistral": "llama",
    "gpt2": "gpt2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_back_as_hugging_face_has_them(tmp_path: Path, family: str) -> None:
    model = oracle(family)
    expected = tiny.checkpoint(model).tensors
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", model, FAMILIES[family]))
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape), name
        loaded = checkpoint.load(name, torch.float32)
        assert torch.equal(loaded, tensor), name
        assert loaded.is_contiguous(), name
        assert torch.equal(checkpoint.load(name, torch.bfloat16), tensor.bfloat16()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_config_says_what_hugging_face_says(tmp_path: Path, family: str) -> None:
    model = oracle(family)
    config = open_checkpoint(write_model(tmp_path / "m.gguf", model, FAMILIES[family])).config
    theirs = model.config.to_dict()
    names = ["vocab_size", "tie_word_embeddings"]
    if family == "gpt2":
        names += ["n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon", "activation_function"]
    else:
        names += ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        names += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"]
        assert config["rope_theta"] == 10000.0
        assert config["head_dim"] == (theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"])
    assert {name: config[name] for name in names} == {name: theirs[name] for name in names}
    expected = "LlamaForCausalLM" if family == "mistral" else type(model).__name__
    assert config["architectures"] == [expected]


def gemma3(path: Path) -> tuple[Any, Checkpoint]:
    """A model, and its file as llama.cpp writes it."""

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)  # as the tiny model's layers are
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    model = oracle("gemma3", query_pre_attn_scalar=12)  # the file cannot say another than the head dimension
    return model, open_checkpoint(write_model(path, model, "gemma3", extra=extra))


def test_gemma3_norms_come_back_as_their_distance_from_one(tmp_path: Path) -> None:
    model, checkpoint = gemma3(tmp_path / "m.gguf")
    expected = tiny.checkpoint(model).tensors
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        loaded = checkpoint.load(name, torch.float32)
        torch.testing.assert_close(loaded, tensor, rtol=0, atol=1e-7 if name.endswith("norm.weight") else 0)
        assert torch.equal(checkpoint.load(name, torch.bfloat16), loaded.bfloat16())


def test_gemma3_config_makes_the_model_of_the_file(tmp_path: Path) -> None:
    """Kinds of layers, both rotations, the window and the scale of scores: the same logits as Hugging Face's."""
    model, checkpoint = gemma3(tmp_path / "m.gguf")
    config = checkpoint.config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (config["hidden_activation"], config["query_pre_attn_scalar"]) == ("gelu_pytorch_tanh", 12)
    assert "hidden_act" not in config
    runner = Runner.load(EngineConfig(dtype="float32", kv_cache_gib=0.01, threads=1).validate(), checkpoint)
    tiny.check_logprobs(runner, model)


def test_unpermuted_rows_give_the_same_attention_scores(tmp_path: Path) -> None:
    """Independent of both converters: RoPE on interleaved pairs of the file = RoPE on halves of what is loaded."""
    heads, size, width, position = 3, 8, 16, 5
    rng = np.random.default_rng(0)
    stored = {kind: rng.standard_normal((heads * size, width)).astype(np.float32) for kind in "qk"}
    x = {kind: rng.standard_normal(width).astype(np.float32) for kind in "qk"}
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 64, "embedding_length": width, "block_count": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_feed_forward_length(8)
    writer.add_head_count(heads)
    writer.add_key_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((8, width), np.float32))
    for kind in "qk":
        writer.add_tensor(f"blk.0.attn_{kind}.weight", stored[kind])
    close(writer)
    checkpoint = open_checkpoint(path)
    angles = position * 10000.0 ** (-np.arange(size // 2) * 2 / size)
    turn = np.exp(1j * angles)

    def scores_interleaved() -> np.ndarray:
        pairs = {kind: (stored[kind] @ x[kind]).reshape(heads, size // 2, 2) for kind in "qk"}
        q, k = (pairs[kind][..., 0] + 1j * pairs[kind][..., 1] for kind in "qk")
        return (q * turn * k.conj()).real.sum(-1)

    def scores_halves() -> np.ndarray:
        loaded = {
            kind: checkpoint.load(f"model.layers.0.self_attn.{kind}_proj.weight", torch.float32).numpy()
            for kind in "qk"
        }
        halves = {kind: (loaded[kind] @ x[kind]).reshape(heads, 2, size // 2) for kind in "qk"}
        q, k = (halves[kind][:, 0] + 1j * halves[kind][:, 1] for kind in "qk")
        return (q * turn * k.conj()).real.sum(-1)

    np.testing.assert_allclose(scores_halves(), scores_interleaved(), rtol=1e-5)
    assert not np.array_equal(stored["q"], interleaved(stored["q"], heads))


def test_quantised_rotary_rows_move_whole(tmp_path: Path) -> None:
    model = oracle("llama-tied", hidden_size=64, num_attention_heads=4, head_dim=16)
    path = tmp_path / "m.gguf"
    rows = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)

    def extra(writer: gguf.GGUFWriter) -> None:
        packed = gguf.quants.quantize(interleaved(rows, 4), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    kept = {
        "model.embed_tokens.weight": torch.zeros(8, 64),
        "model.norm.weight": torch.ones(64),
    }
    model.config.num_hidden_layers = 1
    checkpoint = open_checkpoint(write_model(path, model, "llama", tensors=kept, extra=extra))
    packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    loaded = checkpoint.load("model.layers.0.self_attn.q_proj.weight", torch.float32)
    np.testing.assert_array_equal(loaded.numpy(), expected)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda w: None, None),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
        (
            lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0)),
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            lambda w: (
                w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                w.add_rope_scaling_factor(4.0),
                w.add_rope_scaling_orig_ctx_len(64),
                w.add_rope_scaling_yarn_beta_fast(16.0),
            ),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, write: object, expected: dict[str, object] | None) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", oracle("llama"), "llama", extra=write))
    assert checkpoint.config.get("rope_scaling") == expected
    assert "rope_freq_factors" not in checkpoint.config


def test_llama3_rope_comes_as_a_tensor_of_factors(tmp_path: Path) -> None:
    factors = np.array([1, 1, 2, 8], np.float32)
    write = lambda w: w.add_tensor("rope_freqs.weight", factors)  # noqa: E731
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", oracle("llama"), "llama", extra=write))
    assert checkpoint.config["rope_freq_factors"] is True
    assert checkpoint.load("rope_freqs.weight", torch.float32).tolist() == factors.tolist()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda w: w.add_expert_count(8), "expert_used_count"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda w: w.add_key_length(4), "rotary dimension 8"),
        (lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32)), "blk.0.attn_sinks.weight"),
        (lambda w: w.add_tensor("blk.3.attn_q.weight", np.zeros((48, 48), np.float32)), "announces 3 layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, write: object, said: str) -> None:
    path = write_model(tmp_path / "m.gguf", oracle("llama"), "llama", extra=write)
    with pytest.raises(ModelError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    close(writer)
    with pytest.raises(ModelError, match=r"'mamba' is not supported; supported are llama, qwen2, qwen3, gpt2"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_missing_number_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(4, np.float32))
    close(writer)
    with pytest.raises(ModelError, match=r"'llama\.attention\.head_count'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_missing_tensor_and_a_changed_file_are_errors(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", oracle("llama"), "llama")
    checkpoint = open_checkpoint(path)
    with pytest.raises(WeightError, match=r"no tensor 'model\.nothing'"):
        checkpoint.load("model.nothing", torch.float32)
    last = max(checkpoint.names(), key=lambda name: checkpoint._tensors[name][0].offset)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(WeightError, match="the file has changed"):
        checkpoint.load(last, torch.float32)


def test_describe_special_and_template(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template("{{ messages }}")
        writer.add_float32("general.sampling.temp", 0.5)

    vocabulary = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "<s>", "</s>", "<|eot|>"],
        "token_type": [1, 1, 3, 3, 3],
        "merges": ["a b"],
        "bos_token_id": 2,
        "eos_token_id": 3,
        "eot_token_id": 4,
        "add_bos_token": True,
    }
    model = oracle("llama")
    path = write_model(tmp_path / "m.gguf", model, "llama", vocabulary=vocabulary, extra=extra)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "gguf"
    assert checkpoint.describe() == "GGUF F32, 0 MiB"
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.special == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": None,
        "bos_token_id": 2,
        "eos_token_ids": [3, 4],
        "add_bos": True,
    }
    assert checkpoint.config["eos_token_id"] == 3


def test_special_id_out_of_range(tmp_path: Path) -> None:
    vocabulary = {"model": "gpt2", "tokens": ["a"], "merges": ["a b"], "eos_token_id": 7}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", oracle("llama"), "llama", vocabulary=vocabulary))
    with pytest.raises(ModelError, match="eos_token_id' names no token: 7"):
        assert checkpoint.special
