"""Architectures by the name that a checkpoint's config gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from liushui.errors import ModelError
from liushui.kernels.arrays import item_bytes, type_name
from liushui.kernels.policy import KernelPolicy
from liushui.layers.attention import AttentionShape
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.weights import Weights
from liushui.models.gemma3 import Gemma3
from liushui.models.gpt2 import GPT2
from liushui.models.granite import Granite
from liushui.models.llama import Llama, Mistral
from liushui.models.moe import Mixtral, Qwen3Moe
from liushui.models.olmo2 import Olmo2
from liushui.models.phi3 import Phi3
from liushui.models.qwen import Qwen2, Qwen3

if TYPE_CHECKING:
    import torch


class Model(Protocol):
    """What the runner asks of a model."""

    shape: AttentionShape

    def forward(self, kv: KVCache, batch: BatchTensors) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], Weights, KernelPolicy, int], Model]] = {
    "GPT2LMHeadModel": GPT2,
    "Gemma3ForCausalLM": Gemma3,
    "GraniteForCausalLM": Granite,
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "MixtralForCausalLM": Mixtral,
    "Olmo2ForCausalLM": Olmo2,
    "Phi3ForCausalLM": Phi3,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
}


WHOLE = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Those that the native library can run as a whole: their parts are put together without a tensor's arithmetic."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What must be known of a model before its weights are read."""

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    def kv_bytes_per_token(self, dtype: Any) -> int:
        """`dtype`: torch's, or its name."""
        scale = 4 if type_name(dtype) == "int8" else 0  # float32, for each token and head
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * item_bytes(dtype) + scale)


def architecture(config: Mapping[str, Any]) -> str:
    """The architecture's name. Raises `ModelError` with the list of known ones."""
    names: list[str] = list(config.get("architectures") or [])
    for name in names:
        if name in ARCHITECTURES:
            return name
    found = ", ".join(names) or "none named in config.json"
    raise ModelError(f"architecture not supported: {found}; known: {', '.join(sorted(ARCHITECTURES))}")


def sizes(config: Mapping[str, Any]) -> ModelSizes:
    name = architecture(config)
    try:
        if name == "GPT2LMHeadModel":
            heads, hidden = int(config["n_head"]), int(config["n_embd"])
            layers, positions = int(config["n_layer"]), int(config["n_positions"])
            kv_heads, head_dim = heads, hidden // heads
        else:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            layers, positions = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
            kv_heads = int(config.get("num_key_value_heads") or heads)
            head_dim = int(config.get("head_dim") or hidden // heads)
        return ModelSizes(name, layers, kv_heads, head_dim, int(config["vocab_size"]), positions)
    except KeyError as missing:
        raise ModelError(f"config: key {missing} is missing for {name}") from None


def build(config: Mapping[str, Any], weights: Weights, policy: KernelPolicy, max_positions: int) -> Model:
    """The model with its weights; every tensor of the checkpoint is used, and none is missing."""
    model = ARCHITECTURES[architecture(config)](config, weights, policy, max_positions)
    weights.finish()
    return model
