"""Tiny GGUF files written the way llama.cpp's converter writes them, from Hugging Face models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str, arch: str = "llama") -> str:
    names = GEMMA3_NAMES if arch == "gemma3" else LLAMA_NAMES
    stem, _, suffix = name.rpartition(".")
    if name.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{suffix}"
    if name.startswith("transformer.h."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GPT2_NAMES[rest]}.{suffix}"
    return f"{(names | GPT2_NAMES)[stem]}.{suffix}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's layout of a rotary projection: row 2 i + h of a head is row h * half + i of Hugging Face's."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                out[head * size + 2 * i + half] = rows[head * size + half * (size // 2) + i]
    return out


def write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    if arch == "gpt2":
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1000000.0 if arch == "gemma3" else 10000.0)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    elif arch == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Mapping[str, Any]) -> None:
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


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    model: Any,
    arch: str,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """The GGUF file of a Hugging Face `model`; unquantised. `extra` may add metadata or tensors of its own."""
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, model.config, arch)
    write_vocabulary(writer, vocabulary or {})
    if extra is not None:
        extra(writer)
    config = model.config
    for name, tensor in (tensors or hf_tensors(model)).items():
        values = tensor.numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = interleaved(values, heads)
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = values.T
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(gguf_name(name, arch), np.ascontiguousarray(values))
    close(writer)
    return path


def hf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors Hugging Face would save: without a head that is only the embedding again."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def bare(arch: str = "llama", **metadata: Any) -> Callable[[Path], Path]:
    """A file with metadata and an embedding [8, 4] only; values as Python has them."""

    def write(path: Path) -> Path:
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
        close(writer)
        return path

    return write
