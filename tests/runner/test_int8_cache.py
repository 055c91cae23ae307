"""Keys and values in int8: close to the exact answer, the same bits whatever the batch, refused where it cannot be."""

import pytest
import torch

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import ParameterError
from liushui.kernels.native import NativeOps
from liushui.models.registry import ModelSizes
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.support import tiny

NATIVE = [name for name in IMPLEMENTATIONS if name != "torch"]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


def _prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_against_float64(name: str, dtype: torch.dtype) -> None:
    """Written and read: within what rounding to 127 steps allows; beside others and in chunks the same bits."""
    ops = IMPLEMENTATIONS[name]
    assert isinstance(ops, NativeOps)
    heads, kv, dim, length, blocks, size = 6, 2, 24, 90, 8, 16
    qkv = torch.randn(length, (heads + 2 * kv) * dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k, v = qkv.double().view(length, -1, dim).split([heads, kv, kv], dim=1)
    keys, values = (x.repeat_interleave(heads // kv, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * 0.2
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
    table = torch.tensor([[3, 1, 7, 0, 6, 2]], dtype=torch.int32)

    def run(start: int, end: int, caches: tuple, scales: tuple) -> torch.Tensor:
        positions = torch.arange(start, end, dtype=torch.int32)
        slots = (table[0, positions.long() // size] * size + positions % size).int()
        rows = qkv[start:end].clone()
        ops.qkv_to_cache(rows, heads, kv, dim, positions, slots, *caches, None, None, None, 1e-6, scales)
        starts, lens = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        return ops.attention(rows, heads, kv, dim, *caches, starts, lens, table, 0.2, None, scales)

    def memory() -> tuple[tuple, tuple]:
        caches = tuple(torch.full((blocks, kv, size, dim), 99, dtype=torch.int8) for _ in range(2))
        return caches, tuple(torch.full((blocks, kv, size), torch.nan) for _ in range(2))

    whole = run(0, length, *(made := memory()))
    assert (whole.double() - expected).abs().max() < 0.05
    assert torch.equal(whole[-1:], run(length - 1, length, *made))
    chunked = memory()
    parts = [run(start, end, *chunked) for start, end in ((0, 33), (33, 34), (34, length))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_whole_and_operation_by_operation(dtype: str) -> None:
    model = tiny.oracle("llama-tied", 7)
    exact = tiny.runner(model, dtype=dtype)
    runners = [tiny.runner(model, dtype=dtype, kv_cache_dtype="int8", threads=2) for _ in range(2)]
    assert runners[0].kv.keys.dtype is torch.int8
    assert any("int8" in note for note in runners[0].notes)
    runners[1].host.whole = None
    logprobs = []
    for runner in (*runners, exact):
        driver = tiny.Driver(runner)
        driver.add("a", _prompt(60), SamplingParams(temperature=0, prompt_logprobs=0))
        found = driver.step({"a": 60}).prompt_logprobs["a"]
        logprobs.append(torch.tensor([entry.logprob for _, entry in found]))
    assert torch.equal(logprobs[0], logprobs[1])
    change = (logprobs[0] - logprobs[2]).abs()
    assert 0 < change.mean() < 0.05


def test_quality_on_average() -> None:
    """The mean log-probability of a text, that is its perplexity, hardly moves."""
    model = tiny.oracle("qwen3", 3)
    means = []
    for kind in ("auto", "int8"):
        driver = tiny.Driver(tiny.runner(model, kv_cache_dtype=kind))
        driver.add("a", _prompt(200), SamplingParams(temperature=0, prompt_logprobs=0))
        found = driver.step({"a": 200}).prompt_logprobs["a"]
        means.append(sum(entry.logprob for _, entry in found) / len(found))
    assert means[0] == pytest.approx(means[1], rel=5e-3)


def test_what_cannot_be_had_is_refused_by_name() -> None:
    model = tiny.oracle("llama")
    with pytest.raises(ParameterError, match=r"kv_cache_dtype.*native"):
        tiny.runner(model, kernels="torch", kv_cache_dtype="int8")
    with pytest.raises(ParameterError, match=r"kv_cache_dtype.*bfloat16 beside float32"):
        tiny.runner(model, kv_cache_dtype="bfloat16")
    with pytest.raises(ParameterError, match="kv_cache_dtype"):
        EngineConfig(kv_cache_dtype="int4").validate()  # type: ignore[arg-type]
    assert tiny.runner(model, kv_cache_dtype="float32").kv.keys.dtype is torch.float32


def test_memory_counts_the_scales() -> None:
    sizes = ModelSizes("x", 30, 3, 64, 1000, 100)
    assert sizes.kv_bytes_per_token(torch.int8) == 2 * 30 * 3 * 68
    assert sizes.kv_bytes_per_token(torch.bfloat16) == 2 * 30 * 3 * 128
