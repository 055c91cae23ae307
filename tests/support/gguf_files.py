"""Tiny GGUF files written the way llama.cpp's converter writes them, from Hugging Face models.

The names of tensors are those of the `gguf` package's own tables.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support import tiny

Extra = Callable[[gguf.GGUFWriter], Any]
Pack = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType | None]]


def write_model(
    path: Path,
    model: Any,
    arch: str,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    extra: Extra | None = None,
    pack: Pack = lambda name, values: (values, None),
) -> Path:
    """The GGUF file of a Hugging Face `model`, under llama.cpp's name of the architecture.

    `extra` may add metadata or tensors of its own. `pack`: (GGUF name, values) -> what is stored, and its type; None:
    as numpy has it.
    """
    writer = gguf.GGUFWriter(path, arch)
    _write_metadata(writer, model.config, arch)
    _write_vocabulary(writer, vocabulary or {})
    if extra is not None:
        extra(writer)
    tensors = tiny.checkpoint(model).tensors if tensors is None else tensors
    for name, values in _converted(tensors, arch, model.config).items():
        stored, kind = pack(name, np.ascontiguousarray(values))
        writer.add_tensor(name, stored, raw_dtype=kind)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's layout of a rotary projection: row 2 i + h of a head is row h * half + i of Hugging Face's."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = rows[head * size + half * (size // 2) + i]
    return out


def _write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    if arch == "gpt2":
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
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
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch in ("phi3", "granite", "llama"):
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    if arch in ("qwen3", "qwen3moe", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch in ("phi3", "gemma3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Mapping[str, Any]) -> None:
    """`vocabulary`: values by their key under tokenizer.ggml."""
    for key, value in vocabulary.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def _converted(tensors: Mapping[str, torch.Tensor], arch: str, config: Any) -> dict[str, np.ndarray]:
    """The tensors under GGUF's names, in its layout; the experts' matrices of a layer in one."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    made: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        values, together = tensor.numpy(), re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if arch in ("granite", "llama") and (".q_proj." in name or ".k_proj." in name):
            values = interleaved(values, config.num_attention_heads if ".q" in name else config.num_key_value_heads)
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = values.T
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        theirs = table.get_name(together, try_suffixes=(".weight", ".bias"))
        if theirs is None and re.search(r"\.mlp\.(gate|up|down)_proj", name):  # a plain layer among experts
            theirs = name.replace("model.layers", "blk").replace("mlp.", "ffn_").replace("_proj", "")
        assert theirs is not None, name
        if together == name:
            made[theirs] = values
        else:
            made.setdefault(theirs, []).append(values)
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in made.items()}
