"""GGUF's names of things -> Hugging Face's: the configuration and the tensors of the supported architectures.

llama.cpp's converter (convert_hf_to_gguf.py) renames every tensor, and stores some in another form:

* `llama`, `granite`: the rows of the query and key projections, so that the two halves of a rotary pair lie side by
  side (interleaved RoPE). `Layout.ROTARY` says that this must be undone. All others' are stored as they are.
* `gpt2`: the Conv1D weights, [in, out] in Hugging Face's files, are stored as [out, in]: `Layout.TRANSPOSED`.
* `gemma3`: the norms' factors, 1 + weight. `Layout.FROM_ONE` says that the 1 must be taken off.
* Mixtures of experts (`llama` with experts is Mixtral; `qwen3moe`): all experts' weights of a layer in one tensor,
  [experts, out, in]: `Layout.EXPERTS`, and a `{}` in the name where the expert's number goes.
"""

import math
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from liushui.errors import ModelError, WeightError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
"""Phi-3's divisors of the frequencies: tensors in a GGUF file, lists in config.json."""


class Layout(Enum):
    SAME = "same"
    ROTARY = "rotary"
    TRANSPOSED = "transposed"
    FROM_ONE = "from one"
    EXPERTS = "experts"


class Target(NamedTuple):
    """What a GGUF tensor is called in Hugging Face's files, and how it has to be brought into their layout."""

    name: str
    layout: Layout = Layout.SAME


_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_27B_LAYERS = 62
_OLMO2_BLOCK = {key: name for key, name in _LLAMA_BLOCK.items() if key not in ("attn_norm", "ffn_norm")} | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL_BLOCK = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_QWEN3MOE_BLOCK = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_CONV1D = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
_TABLES = {
    "gpt2": (_GPT2, _GPT2_BLOCK, "transformer.h"),
    "gemma3": (_LLAMA, _GEMMA3_BLOCK, "model.layers"),
    "phi3": (_LLAMA, _PHI3_BLOCK, "model.layers"),
    "olmo2": (_LLAMA, _OLMO2_BLOCK, "model.layers"),
    "llama": (_LLAMA, _LLAMA_BLOCK | _MIXTRAL_BLOCK, "model.layers"),
    "qwen3moe": (_LLAMA, _LLAMA_BLOCK | _QWEN3MOE_BLOCK, "model.layers"),
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_OUTER = re.compile(r"([a-z0-9_]+)\.(weight|bias)")


def target(arch: str, name: str) -> Target:
    """The Hugging Face name and the layout of the GGUF tensor `name`. Raises `WeightError` if it is unknown."""
    if name == ROPE_FACTORS and arch != "gpt2":
        return Target(name)
    outer, inner, layers = _TABLES.get(arch, (_LLAMA, _LLAMA_BLOCK, "model.layers"))
    if (match := _BLOCK.fullmatch(name)) and (found := inner.get(match[2])):
        return Target(f"{layers}.{match[1]}.{found}.{match[3]}", _layout(arch, match[2], match[3]))
    if (match := _OUTER.fullmatch(name)) and (found := outer.get(match[1])):
        return Target(f"{found}.{match[2]}", _layout(arch, match[1], match[2]))
    raise WeightError(f"unexpected tensor {name!r} in a GGUF file of architecture {arch!r}: not supported")


def _layout(arch: str, part: str, suffix: str) -> Layout:
    if arch in ("llama", "granite") and part in ("attn_q", "attn_k"):
        return Layout.ROTARY
    if part.endswith("_exps"):
        return Layout.EXPERTS
    if arch == "gpt2" and part in _GPT2_CONV1D and suffix == "weight":
        return Layout.TRANSPOSED
    if arch == "gemma3" and part.endswith("_norm"):
        return Layout.FROM_ONE
    return Layout.SAME


class Metadata:
    """Typed access to `{arch}.*`; what is missing or of the wrong kind raises `ModelError` naming the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.arch = self.text("general.architecture")

    def has(self, name: str) -> bool:
        return f"{self.arch}.{name}" in self.values

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise ModelError(f"GGUF metadata {key!r} must be a string, got {_shown(value)}")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A value per layer is accepted where all layers agree."""
        value = self.values.get(f"{self.arch}.{name}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            raise ModelError(
                f"GGUF metadata '{self.arch}.{name}' must be an integer from {least} on, got {_shown(value)}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"GGUF metadata '{self.arch}.{name}' must be a positive number, got {_shown(value)}")
        return _shortest(float(value))


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]


def _shortest(value: float) -> float:
    """The decimal that was written: GGUF holds 1e-5 as the float32 9.999999747378752e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The metadata `values` as the dictionary of a Hugging Face config.json.

    `shapes` are those of the file's tensors, by GGUF name. Raises `ModelError` for an architecture, or a feature
    of one, that is not supported.
    """
    meta = Metadata(values)
    if meta.arch not in ARCHITECTURES:
        raise ModelError(f"GGUF architecture {meta.arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2 or embedding[1] != meta.integer("embedding_length"):
        raise WeightError(
            f"tensor 'token_embd.weight' must be [vocabulary, {meta.integer('embedding_length')}], got {embedding}"
        )
    _check_blocks(meta.integer("block_count"), shapes)
    common = {
        "architectures": [ARCHITECTURES[meta.arch]],
        "model_type": meta.arch,
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(token := values.get(f"tokenizer.ggml.{key}"), int):
            common[key] = token
    if meta.arch == "gpt2":
        return common | _gpt2_config(meta)
    settings = _llama_config(meta, shapes)
    special = _SPECIAL.get("mixtral" if meta.arch == "llama" and _num_experts(meta) else meta.arch)
    return common | (settings if special is None else special(meta, settings, shapes))


def _check_blocks(count: int, shapes: Collection[str]) -> None:
    found = {int(match[1]) for name in shapes if (match := _BLOCK.fullmatch(name))}
    if found != set(range(len(found))) or len(found) != count:
        raise WeightError(f"the file announces {count} layers and holds tensors of {len(found)}")


def _llama_config(meta: Metadata, shapes: Collection[str]) -> dict[str, Any]:
    if _num_experts(meta) and meta.arch not in ("llama", "qwen3moe"):
        raise ModelError(f"GGUF architecture {meta.arch!r} with experts (mixture of experts) is not supported")
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", default=max(1, hidden // heads))
    rotary = meta.integer("rope.dimension_count", default=head_dim)
    partial = meta.arch == "phi3" and rotary < head_dim
    if (rotary != head_dim and not partial) or meta.integer("attention.value_length", default=head_dim) != head_dim:
        raise ModelError(
            f"GGUF metadata: rotary dimension {rotary} and value length must equal the head dimension {head_dim}"
        )
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", default=10000.0),
    }
    settings["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if meta.arch == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if meta.has("attention.sliding_window") and meta.integer("attention.sliding_window", least=0):
        settings["sliding_window"] = meta.integer("attention.sliding_window")
    if (scaling := _rope_scaling(meta)) is not None:
        settings["rope_scaling"] = scaling
    if ROPE_FACTORS in shapes:
        settings["rope_freq_factors"] = True
    return settings


def _num_experts(meta: Metadata) -> int:
    return meta.integer("expert_count", default=0, least=0)


def _mixtral_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    if settings.get("attention_bias"):
        raise ModelError("GGUF architecture 'llama' with experts and biases is not supported")
    return dict(settings) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": _num_experts(meta),
        "num_experts_per_tok": meta.integer("expert_used_count"),
    }


def _qwen3moe_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    """Layers without a router have a plain MLP. The weights of the chosen experts sum to 1 (llama.cpp, qwen3moe)."""
    layers = range(settings["num_hidden_layers"])
    return dict(settings) | {
        "model_type": "qwen3_moe",
        "num_experts": _num_experts(meta),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in shapes],
        "use_sliding_window": "sliding_window" in settings,
    }


def _granite_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    """A scale that the file leaves out does nothing; scores are then divided by the root of the head dimension."""
    return dict(settings) | {
        "embedding_multiplier": meta.number("embedding_scale", default=1.0),
        "attention_multiplier": meta.number("attention.scale", default=settings["head_dim"] ** -0.5),
        "residual_multiplier": meta.number("residual_scale", default=1.0),
        "logits_scaling": meta.number("logit_scale", default=1.0),
    }


def _olmo2_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    if "sliding_window" in settings:
        raise ModelError("GGUF architecture 'olmo2' with a sliding window (OLMo 3) is not supported")
    return dict(settings)


def _phi3_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    """The rotation may cover a part of each head. LongRoPE's factors are tensors, which the checkpoint reads."""
    head_dim = settings["head_dim"]
    rotary = meta.integer("rope.dimension_count", default=head_dim)
    share = rotary / head_dim
    special: dict[str, Any] = {
        "partial_rotary_factor": share if int(head_dim * share) == rotary else math.nextafter(share, 1.0)
    }
    longrope = all(name in shapes for name in LONGROPE_FACTORS)
    if meta.has("rope.scaling.attn_factor") and not longrope and meta.number("rope.scaling.attn_factor") != 1.0:
        raise ModelError("GGUF architecture 'phi3' with rope.scaling.attn_factor needs the tensors rope_factors_*")
    if longrope:
        whole = settings["max_position_embeddings"]
        special["rope_scaling"] = {
            "rope_type": "longrope",
            "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length", default=whole),
            "attention_factor": meta.number("rope.scaling.attn_factor", default=1.0),
        }
    return dict(settings) | special


def _gemma3_config(meta: Metadata, settings: Mapping[str, Any], shapes: Collection[str]) -> dict[str, Any]:
    """What llama.cpp (llama-model.cpp) knows of Gemma 3 without the file saying so."""
    if "rope_freq_factors" in settings:
        raise ModelError("GGUF architecture 'gemma3' with frequency factors is not supported")
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    is_27b = settings["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    special = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_27b else settings["head_dim"],
        "sliding_window": meta.integer("attention.sliding_window"),
        "sliding_window_pattern": meta.integer("attention.sliding_window_pattern", default=6),
        "rope_theta": meta.number("rope.freq_base", default=1e6),
        "rope_local_base_freq": meta.number("rope.freq_base_swa", default=10000.0),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if meta.has(name):
            special[name] = meta.number(name)
    return {key: value for key, value in settings.items() if key != "hidden_act"} | special


_SPECIAL = {
    "gemma3": _gemma3_config,
    "phi3": _phi3_config,
    "granite": _granite_config,
    "olmo2": _olmo2_config,
    "qwen3moe": _qwen3moe_config,
    "mixtral": _mixtral_config,
}


def _rope_scaling(meta: Metadata) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, or None for plain RoPE.

    Llama 3's scaling is not in the metadata: the file holds its effect, a divisor per frequency, as the tensor
    `rope_freqs.weight`.
    """
    kind = meta.text(f"{meta.arch}.rope.scaling.type", "linear" if meta.has("rope.scale_linear") else "none")
    if kind == "none":
        return None
    legacy = meta.number("rope.scale_linear", default=1.0)
    factor = meta.number("rope.scaling.factor", default=legacy)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind != "yarn":
        raise ModelError(f"GGUF metadata '{meta.arch}.rope.scaling.type': {kind!r} is not supported")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer(
            "rope.scaling.original_context_length", default=meta.integer("context_length")
        ),
    }
    for name in ("beta_fast", "beta_slow"):
        if meta.has(f"rope.scaling.yarn_{name}"):
            scaling[name] = meta.number(f"rope.scaling.yarn_{name}")
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if meta.has(name) and meta.number(name) != 1.0:  # llama.cpp multiplies YaRN's own factor by it
            scaling["attention_factor"] = meta.number(name) * (0.1 * math.log(factor) + 1.0)
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"):
        if meta.has(name) and meta.number(name) != 1.0:
            raise ModelError(f"GGUF metadata '{meta.arch}.{name}' is not supported")
    return scaling


def _gpt2_config(meta: Metadata) -> dict[str, Any]:
    return {
        "n_embd": meta.integer("embedding_length"),
        "n_inner": meta.integer("feed_forward_length"),
        "n_layer": meta.integer("block_count"),
        "n_head": meta.integer("attention.head_count"),
        "n_positions": meta.integer("context_length"),
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }
