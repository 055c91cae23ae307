"""Checkpoints are read strictly: each problem names its tensor or architecture."""

import pytest
import torch

from liushui.errors import ModelError, WeightError
from liushui.layers import weights as weights_module
from liushui.layers.weights import Weights
from liushui.models.registry import ARCHITECTURES, architecture, sizes
from tests.support import tiny


def _load(point: tiny.DictCheckpoint) -> None:
    from liushui.config import EngineConfig
    from liushui.runner.runner import Runner

    Runner.load(EngineConfig(kv_cache_gib=0.01, dtype="float32"), point)


def test_a_missing_tensor_is_named() -> None:
    point = tiny.checkpoint(tiny.oracle("llama"))
    del point.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \[80, 48\] is missing"):
        _load(point)


def test_an_extra_tensor_is_named() -> None:
    point = tiny.checkpoint(tiny.oracle("qwen2"))
    point.tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(48)
    with pytest.raises(WeightError, match=r"does not use: model\.layers\.0\.self_attn\.o_proj\.bias"):
        _load(point)


def test_a_misshapen_tensor_is_named_with_both_shapes() -> None:
    point = tiny.checkpoint(tiny.oracle("gpt2"))
    point.tensors["transformer.h.2.attn.c_attn.weight"] = torch.zeros(144, 48)
    with pytest.raises(
        WeightError, match=r"c_attn\.weight has shape \[144, 48\], the model's config asks for \[48, 144\]"
    ):
        _load(point)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        architecture({"architectures": ["MambaForCausalLM"]})
    assert "MambaForCausalLM" in str(caught.value)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_a_config_without_a_needed_key_is_refused() -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        sizes({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2})


def test_base_checkpoints_without_prefix_load() -> None:
    """GPT-2's own files name their tensors without 'transformer.'."""
    model = tiny.oracle("gpt2")
    point = tiny.checkpoint(model)
    point.tensors = {name.removeprefix("transformer."): t for name, t in point.tensors.items()}
    _load(point)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_unknown_rope_scaling_is_refused(kind: str) -> None:
    point = tiny.checkpoint(tiny.oracle("llama"))
    point.config["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=f"rope_scaling: type '{kind}'"):
        _load(point)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3", "final_logit_softcapping", 30.0),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "hidden_activation", "relu"),
        ("gemma3", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        ("gemma3", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("granite", "mlp_bias", True),
        ("olmo2", "hidden_act", "gelu"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(family: str, key: str, value: object) -> None:
    point = tiny.checkpoint(tiny.oracle(family))
    point.config[key] = value
    with pytest.raises(ModelError, match=key):
        _load(point)


def test_gemma3_without_the_keys_that_its_files_leave_out() -> None:
    point = tiny.checkpoint(tiny.oracle("gemma3"))
    for key in ("tie_word_embeddings", "rms_norm_eps", "hidden_activation", "attention_bias"):
        del point.config[key]
    _load(point)


def test_a_missing_number_of_experts_is_named() -> None:
    point = tiny.checkpoint(tiny.oracle("mixtral"))
    del point.config["num_experts_per_tok"]
    with pytest.raises(ModelError, match="num_experts_per_tok"):
        _load(point)


def test_reading_ahead_gives_every_tensor_once_in_any_order_and_its_own_errors() -> None:
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(50)}

    def load(name: str, dtype: torch.dtype) -> torch.Tensor:
        if name == "t7":
            raise WeightError("tensor t7 is damaged")
        return tensors[name].to(dtype)

    weights = Weights(tensors, lambda name: tuple(tensors[name].shape), load, torch.float32)
    for i in [*range(49, 24, -1), *range(25)]:
        if i == 7:
            with pytest.raises(WeightError, match="t7 is damaged"):
                weights.take("t7", 1000)
        else:
            assert torch.equal(weights.take(f"t{i}", 1000), tensors[f"t{i}"])
    weights.finish()
    weights.close()


def test_reading_ahead_stops_when_the_model_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "READ_AHEAD_BYTES", 1)
    read: list[str] = []

    def load(name: str, dtype: torch.dtype) -> torch.Tensor:
        read.append(name)
        return torch.zeros(10, dtype=dtype)

    weights = Weights([f"t{i}" for i in range(50)], lambda name: (10,), load, torch.float32)
    weights.take("t0", 10)
    weights.close()
    assert len(read) < 50
