"""A checkpoint of random weights, made by config on the device itself: for timing shapes without files."""

from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
}  # fmt: skip


class RandomCheckpoint:
    """Weights of standard deviation 0.02 (norms: 1), the same for the same seed."""

    def __init__(self, config: dict[str, Any], device: torch.device, seed: int = 0) -> None:
        self.config, self.device = config, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._shapes = dict(self._named_shapes())

    def _named_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        c = self.config
        hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        queries, keys = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
        found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (c["vocab_size"], hidden))]
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            found += [
                (f"{layer}.input_layernorm.weight", (hidden,)),
                (f"{layer}.post_attention_layernorm.weight", (hidden,)),
                (f"{layer}.self_attn.q_proj.weight", (queries, hidden)),
                (f"{layer}.self_attn.k_proj.weight", (keys, hidden)),
                (f"{layer}.self_attn.v_proj.weight", (keys, hidden)),
                (f"{layer}.self_attn.o_proj.weight", (hidden, queries)),
                (f"{layer}.mlp.gate_proj.weight", (inner, hidden)),
                (f"{layer}.mlp.up_proj.weight", (inner, hidden)),
                (f"{layer}.mlp.down_proj.weight", (hidden, inner)),
            ]
            if "Qwen3" in c["architectures"][0]:
                found += [(f"{layer}.self_attn.{n}_norm.weight", (dim,)) for n in "qk"]
        found.append(("model.norm.weight", (hidden,)))
        if not c["tie_word_embeddings"]:
            found.append(("lm_head.weight", (c["vocab_size"], hidden)))
        return found

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, 0.02, generator=self._generator)

    def bytes(self, itemsize: int = 2) -> int:
        """Of all weights that a decode step reads: the embedding only as a head."""
        total = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        if not self.config["tie_word_embeddings"]:
            total -= torch.Size(self._shapes["model.embed_tokens.weight"]).numel()
        return total * itemsize
