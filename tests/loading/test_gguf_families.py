"""Phi-3, Granite, OLMo 2, Mixtral and Qwen3-MoE from files of llama.cpp's kind: Hugging Face's tensors and logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from liushui.config import EngineConfig
from liushui.errors import ModelError, WeightError
from liushui.loading import open_checkpoint
from liushui.runner.runner import Runner
from tests.support import tiny
from tests.support.gguf_files import write_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3": ("phi3", "phi3", {}),
    "phi3-partial-rope": ("phi3-partial-rope", "phi3", {}),
    "granite": ("granite", "granite", {}),
    "olmo2": ("olmo2", "olmo2", {}),
    "mixtral": ("mixtral", "llama", {}),
    "qwen3-moe": ("qwen3-moe", "qwen3moe", {}),
    "qwen3-moe with a plain layer": ("qwen3-moe-mixed", "qwen3moe", {"norm_topk_prob": True, "sliding_window": None}),
}
"""name -> (family in tests.support.tiny, llama.cpp's architecture, changes that the file can say)."""


def load(path: Path, **settings: Any) -> Runner:
    config = EngineConfig(dtype="float32", device="cpu", kv_cache_gib=0.01, threads=1, **settings)
    return Runner.load(config.validate(), open_checkpoint(path))


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_logits_are_hugging_faces(tmp_path: Path, name: str) -> None:
    family, arch, changes = FAMILIES[name]
    model = tiny.oracle(family, **changes)
    path, expected = write_model(tmp_path / "m.gguf", model, arch), tiny.checkpoint(model)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["architectures"] == expected.config["architectures"]
    assert sorted(checkpoint.names()) == sorted(expected.names())
    for key in expected.names():
        assert checkpoint.shape(key) == expected.shape(key), key
        assert torch.equal(checkpoint.load(key, torch.float32), expected.tensors[key]), key
    tiny.check_logprobs(load(path), model)


def test_phi3s_long_factors_are_read_from_tensors(tmp_path: Path) -> None:
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "sliding_window": None}
    model = tiny.oracle("phi3", num_attention_heads=6, **changes)

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(4) / np.log(64))))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(LONGROPE[f"{length}_factor"], np.float32))

    path = write_model(tmp_path / "m.gguf", model, "phi3", extra=extra)
    scaling = open_checkpoint(path).config["rope_scaling"]
    assert (scaling["short_factor"], scaling["long_factor"]) == (LONGROPE["short_factor"], LONGROPE["long_factor"])
    tiny.check_logprobs(load(path, max_model_len=64), model)
    with pytest.raises(ModelError, match="set max_model_len to 64 or less"):
        load(path)


def test_quantised_experts_are_cut_apart_whole(tmp_path: Path) -> None:
    model = tiny.oracle("mixtral", hidden_size=64, num_attention_heads=4)
    q8 = gguf.GGMLQuantizationType.Q8_0
    stored: dict[str, np.ndarray] = {}

    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, Any]:
        if not name.endswith("gate_exps.weight"):
            return values, None
        packed = gguf.quants.quantize(values, q8)
        stored[name] = gguf.quants.dequantize(packed, q8)
        return packed, q8

    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", model, "llama", pack=pack))
    for layer in range(3):
        for i, expected in enumerate(stored[f"blk.{layer}.ffn_gate_exps.weight"]):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{i}.w1.weight"
            np.testing.assert_array_equal(checkpoint.load(name, torch.float32).numpy(), expected)


@pytest.mark.parametrize(
    ("family", "arch", "extra", "message"),
    [
        ("olmo2", "olmo2", lambda w: w.add_sliding_window(64), "OLMo 3"),
        ("phi3", "phi3", lambda w: w.add_rope_scaling_attn_factors(1.2), "rope_factors"),
        ("granite", "granite", lambda w: w.add_expert_count(4), "with experts"),
        ("mixtral", "llama", lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(48, np.float32)), "biases"),
    ],
)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, family: str, arch: str, extra: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    path = write_model(tmp_path / "m.gguf", tiny.oracle(family), arch, extra=extra)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    def flat(name: str, values: np.ndarray) -> tuple[np.ndarray, Any]:
        return (values.reshape(-1, values.shape[-1]) if "_exps" in name else values), None

    path = write_model(tmp_path / "m.gguf", tiny.oracle("mixtral"), "llama", pack=flat)
    with pytest.raises(WeightError, match="a matrix for each expert"):
        open_checkpoint(path)
