"""A model that runs without torch: bit for bit the runner with torch, and torch comes when a row needs it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.kernels.arrays import Array
from liushui.loading import open_checkpoint
from liushui.runner.runner import Runner
from tests.support import gguf_files, tiny

pytestmark = pytest.mark.skipif(not tiny.native_is_built(), reason="the native library is not built")
TYPES = gguf.GGMLQuantizationType
FAMILIES = [("llama", "llama"), ("llama-tied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]


def _mixed(name: str, values: np.ndarray) -> tuple[np.ndarray, Any]:
    """Matrices in several types, as quantised files have them."""
    if values.ndim < 2 or values.shape[1] % 32:
        return values, None
    kind = (TYPES.Q8_0, TYPES.Q4_1, TYPES.F16, TYPES.Q5_1)[sum(name.encode()) % 4]
    return gguf.quants.quantize(values, kind), kind


def _pair(path: Path, **settings: Any) -> tuple[Runner, Runner]:
    config = EngineConfig(**{"model": "tiny", "threads": 2, "kv_cache_gib": 0.05, "device": "cpu", **settings})
    checkpoint = open_checkpoint(path)
    plain = Runner.load(config, checkpoint)
    assert isinstance(plain.kv.keys, Array)
    return plain, Runner._load_any(config, checkpoint, 0.0)


@pytest.fixture(params=FAMILIES, ids=[family for family, _ in FAMILIES])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, arch = request.param
    return gguf_files.write_model(tmp_path / "m.gguf", tiny.oracle(family, 3), arch, pack=_mixed)


def _prompt(length: int) -> list[int]:
    return torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(length)).tolist()


SETTINGS = (
    ("float32", "auto", "auto"), ("float32", "float32", "auto"), ("bfloat16", "bf16", "auto"),
    ("float32", "int8", "auto"), ("float32", "auto", "int8"),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "weights", "kv"), SETTINGS, ids=map("-".join, SETTINGS))
def test_the_same_bits_with_and_without_torch(path: Path, dtype: str, weights: str, kv: str) -> None:
    """Prompts in chunks, greedy and drawn, with log-probabilities; then what lies in the cache."""
    runners = _pair(path, dtype=dtype, weights=weights, kv_cache_dtype=kv)
    drivers = [tiny.Driver(runner) for runner in runners]
    for driver in drivers:
        driver.add("a", _prompt(5), SamplingParams(temperature=0))
        driver.add("b", _prompt(33), SamplingParams(temperature=0, prompt_logprobs=2, logprobs=3))
        driver.add("c", _prompt(40), SamplingParams(temperature=0.8, top_p=0.9), seed=4)
    for share in ({"a": 5, "b": 20}, {"a": 1, "b": 13, "c": 40}, {"a": 1, "b": 1, "c": 1}):
        mine, theirs = (driver.step(share) for driver in drivers)
        assert mine == theirs
    plain, other = runners
    for name, table in drivers[0].tables.items():
        count = drivers[0].computed[name]
        for found, known in ((plain.kv.keys, other.kv.keys), (plain.kv.values, other.kv.values)):
            assert torch.equal(_written(found.tensor(), table, count), _written(known, table, count))
    lines = [[line for line in runner.notes if "weights read" not in line] for runner in runners]
    assert lines[0] == lines[1]
    assert (plain.quantised, plain.in_blocks) == (other.quantised, other.in_blocks)


def _written(cache: torch.Tensor, table: list[int], count: int) -> torch.Tensor:
    return cache[:, table].transpose(2, 3).flatten(1, 2)[:, :count]


def test_native_weights(tmp_path: Path) -> None:
    path = gguf_files.write_model(tmp_path / "m.gguf", tiny.oracle("llama", 3), "llama", pack=_mixed)
    drivers = [tiny.Driver(runner) for runner in _pair(path, dtype="float32", weights="native")]
    for driver in drivers:
        driver.add("a", _prompt(20), SamplingParams(temperature=0, logprobs=2))
    mine, theirs = (driver.step({"a": 20}) for driver in drivers)
    assert mine == theirs


def test_layers_when_somebody_watches(path: Path) -> None:
    """The model that torch runs takes over in the middle of a sequence: the cache is kept."""
    plain, other = _pair(path)
    drivers = [tiny.Driver(plain), tiny.Driver(other)]
    for driver in drivers:
        driver.add("a", _prompt(20))
        driver.step({"a": 20})
    plain.model = watched = tiny.Listening(plain.model)
    for _ in range(2):
        mine, theirs = (driver.step({"a": 1}) for driver in drivers)
        assert mine == theirs
    assert len(watched.logits_made) == 2


def test_what_is_not_plain_takes_the_way_with_torch(tmp_path: Path) -> None:
    for family, arch in (("gpt2", "gpt2"), ("granite", "granite")):
        path = gguf_files.write_model(tmp_path / f"{arch}.gguf", tiny.oracle(family), arch)
        runner = Runner.load(EngineConfig(model="tiny", device="cpu", threads=1), open_checkpoint(path))
        assert isinstance(runner.kv.keys, torch.Tensor)
    path = gguf_files.write_model(tmp_path / "llama.gguf", tiny.oracle("llama"), "llama")
    for settings in ({"kernels": "torch"}, {"numerics": "fast"}):
        config = EngineConfig(model="tiny", device="cpu", threads=1, **settings)  # type: ignore[arg-type]
        assert isinstance(Runner.load(config, open_checkpoint(path)).kv.keys, torch.Tensor)
