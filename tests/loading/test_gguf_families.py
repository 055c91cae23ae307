"""Phi-3, Granite, OLMo 2, Mixtral and Qwen3-MoE as llama.cpp writes them: Hugging Face's tensors and logits come back.

The names in these files are those of the `gguf` package's own tables.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import ModelError, WeightError
from liushui.loading import open_checkpoint
from liushui.runner.runner import Runner
from tests.loading.gguf_models import close, interleaved
from tests.support import tiny

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


def write(
    path: Path,
    model: Any,
    arch: str,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    pack: Callable[[str, np.ndarray], tuple[np.ndarray, Any]] = lambda name, values: (values, None),
) -> Path:
    """`pack`: (GGUF name, values) -> what is stored, and its type; None: as numpy has it."""
    writer, source = gguf.GGUFWriter(path, arch), tiny.checkpoint(model)
    _write_metadata(writer, model.config, arch)
    extra(writer)
    for name, values in _renamed(source.tensors, arch, model.config).items():
        stored, kind = pack(name, np.ascontiguousarray(values))
        writer.add_tensor(name, stored, raw_dtype=kind)
    close(writer)
    return path


def _write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch in ("phi3", "granite", "llama"):
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    if arch == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "qwen3moe":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch in ("qwen3moe", "llama"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _renamed(tensors: Mapping[str, torch.Tensor], arch: str, config: Any) -> dict[str, np.ndarray]:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    made: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        values, together = tensor.numpy(), re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if arch in ("granite", "llama") and (".q_proj." in name or ".k_proj." in name):
            values = interleaved(values, config.num_attention_heads if ".q" in name else config.num_key_value_heads)
        theirs = table.get_name(together, try_suffixes=(".weight", ".bias"))
        if theirs is None and re.search(r"\.mlp\.(gate|up|down)_proj", name):  # a plain layer among experts
            theirs = name.replace("model.layers", "blk").replace("mlp.", "ffn_").replace("_proj", "")
        assert theirs is not None, name
        if together == name:
            made[theirs] = values
        else:
            made.setdefault(theirs, []).append(values)
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in made.items()}


def load(path: Path, **settings: Any) -> Runner:
    config = EngineConfig(dtype="float32", device="cpu", kv_cache_gib=0.01, threads=1, **settings)
    return Runner.load(config.validate(), open_checkpoint(path))


def check_logits(runner: Runner, model: Any, length: int = 50) -> None:
    driver = tiny.Driver(runner)
    prompt = torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    driver.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=0))
    found = [entry.logprob for _, entry in driver.step({"a": length}).prompt_logprobs["a"]]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    theirs = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_logits_are_hugging_faces(tmp_path: Path, name: str) -> None:
    family, arch, changes = FAMILIES[name]
    model = tiny.oracle(family, **changes)
    path, expected = write(tmp_path / "m.gguf", model, arch), tiny.checkpoint(model)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["architectures"] == expected.config["architectures"]
    assert sorted(checkpoint.names()) == sorted(expected.names())
    for key in expected.names():
        assert checkpoint.shape(key) == expected.shape(key), key
        assert torch.equal(checkpoint.load(key, torch.float32), expected.tensors[key]), key
    check_logits(load(path), model)


def test_phi3s_long_factors_are_read_from_tensors(tmp_path: Path) -> None:
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "sliding_window": None}
    model = tiny.oracle("phi3", num_attention_heads=6, **changes)

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(4) / np.log(64))))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(LONGROPE[f"{length}_factor"], np.float32))

    path = write(tmp_path / "m.gguf", model, "phi3", extra)
    scaling = open_checkpoint(path).config["rope_scaling"]
    assert (scaling["short_factor"], scaling["long_factor"]) == (LONGROPE["short_factor"], LONGROPE["long_factor"])
    check_logits(load(path, max_model_len=64), model)
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

    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", model, "llama", pack=pack))
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
    path = write(tmp_path / "m.gguf", tiny.oracle(family), arch, extra)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    def flat(name: str, values: np.ndarray) -> tuple[np.ndarray, Any]:
        return (values.reshape(-1, values.shape[-1]) if "_exps" in name else values), None

    path = write(tmp_path / "m.gguf", tiny.oracle("mixtral"), "llama", pack=flat)
    with pytest.raises(WeightError, match="a matrix for each expert"):
        open_checkpoint(path)
