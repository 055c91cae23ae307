"""KV memory: what is asked for fits, or the error says what would."""

from dataclasses import replace

import pytest
import torch

from liushui.config import EngineConfig
from liushui.errors import CapacityError
from liushui.models.registry import ModelSizes
from liushui.runner.gpu_memory import named_when_exhausted, reserve_for_steps, step_bytes
from liushui.runner.memory import GIB, plan_kv
from tests.support.tiny import DictCheckpoint

SMOL = ModelSizes("LlamaForCausalLM", 30, 3, 64, 49152, 8192)


def test_explicit_size_is_kept_and_said_in_tokens_and_requests() -> None:
    plan = plan_kv(EngineConfig(kv_cache_gib=1.2), SMOL, torch.bfloat16, 8 * GIB)
    assert plan.bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert plan.num_tokens * plan.bytes_per_token <= 1.2 * GIB < (plan.num_tokens + 16) * plan.bytes_per_token
    assert plan.notes[0] == "KV cache: 1.20 GiB = 55,920 tokens = 27 requests of 2,048"


def test_default_takes_no_more_than_the_batch_can_use() -> None:
    plan = plan_kv(EngineConfig(max_num_seqs=2, max_model_len=100), SMOL, torch.float32, 8 * GIB)
    assert plan.num_tokens == 2 * 112


def test_default_takes_at_most_half_of_what_is_free_and_limits_the_context() -> None:
    plan = plan_kv(EngineConfig(), SMOL, torch.float32, 100 * 2**20)
    assert plan.num_tokens * plan.bytes_per_token <= 50 * 2**20
    assert plan.max_model_len == plan.num_tokens < SMOL.max_positions
    assert "context limited" in plan.notes[1]


@pytest.mark.parametrize(
    ("settings", "on_gpu", "tokens"),
    [
        ({}, False, 16384),
        ({"max_model_len": 500}, False, 16384),
        ({"kv_cache_gib": 2.0}, False, None),
        ({"max_num_seqs": 4, "max_model_len": 2000}, False, None),
        ({}, True, None),
    ],
)
def test_only_a_cache_of_default_size_on_a_cpu_is_frugal(settings: dict, on_gpu: bool, tokens: int | None) -> None:
    plan = plan_kv(EngineConfig(**settings), SMOL, torch.bfloat16, 64 * GIB, on_gpu=on_gpu)
    assert plan.cache_room == (plan.num_blocks if tokens is None else tokens // plan.block_size)
    longer = plan_kv(EngineConfig(**settings), replace(SMOL, max_positions=20_000), torch.bfloat16, 64 * GIB)
    if not settings:
        assert longer.cache_room == 40_000 // longer.block_size


@pytest.mark.parametrize(
    ("settings", "free", "field"),
    [
        ({"kv_cache_gib": 3.0}, 2 * GIB, "kv_cache_gib"),
        ({"kv_cache_gib": 1e-6}, 2 * GIB, "kv_cache_gib"),
        ({"max_model_len": 9000}, 2 * GIB, "max_model_len"),
        ({"max_model_len": 8000, "kv_cache_gib": 0.1}, 2 * GIB, "max_model_len"),
    ],
)
def test_the_impossible_is_refused_by_name(settings: dict, free: int, field: str) -> None:
    with pytest.raises(CapacityError) as caught:
        plan_kv(EngineConfig(**settings), SMOL, torch.float32, free)
    assert caught.value.field == field


def test_a_gpu_is_filled_in_larger_blocks() -> None:
    plan = plan_kv(EngineConfig(max_num_seqs=1000), SMOL, torch.bfloat16, 8 * GIB, on_gpu=True)
    assert plan.block_size == 64
    assert plan.num_tokens * plan.bytes_per_token > 8 * GIB - 64 * plan.bytes_per_token


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    checkpoint = DictCheckpoint(sizes, {"a": torch.empty(2**20, 1024, device="meta")})
    config = EngineConfig().settled(True)
    reserve = reserve_for_steps(config, checkpoint, torch.bfloat16, 10 * GIB)
    assert reserve == step_bytes(config, sizes) > 2 * GIB
    with pytest.raises(CapacityError, match=r"2\.0 GiB in bfloat16 .* max_num_batched_tokens=(\d+)") as caught:
        reserve_for_steps(config, checkpoint, torch.bfloat16, 5 * GIB)
    assert caught.value.field == "device"
    fits = int(str(caught.value).split("max_num_batched_tokens=")[1].split()[0])
    assert 16 <= fits < 8192
    smaller = replace(config, max_num_batched_tokens=fits, max_num_seqs=min(fits, 256))
    assert reserve_for_steps(smaller, checkpoint, torch.bfloat16, 5 * GIB) <= 3 * GIB
    with pytest.raises(CapacityError, match="smaller model"):
        reserve_for_steps(config, checkpoint, torch.bfloat16, 2 * GIB)


def test_torchs_own_error_names_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    with pytest.raises(CapacityError, match=r"CUDA out of memory.*3\.0 GiB"), named_when_exhausted(torch.device("cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


def test_the_batch_of_the_device() -> None:
    """Of two sizes the one that is given bounds the other; both given stay as they are."""

    def batch(on_gpu: bool, **settings: int) -> tuple[int | None, int | None]:
        settled = EngineConfig(**settings).validate().settled(on_gpu)
        return settled.max_num_seqs, settled.max_num_batched_tokens

    assert batch(False) == (64, 1024) == (EngineConfig().seats, EngineConfig().step_tokens)
    assert batch(True) == (256, 8192)
    assert batch(False, max_num_seqs=2000) == (2000, 2000)
    assert batch(True, max_num_batched_tokens=100) == (100, 100)
    assert batch(True, max_num_seqs=3, max_num_batched_tokens=7) == (3, 7)
