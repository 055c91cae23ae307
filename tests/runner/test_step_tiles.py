"""A step in one native call with software in place of the AMX instructions: the bits of the operations one by one."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from liushui.core.request import SamplingParams
from liushui.kernels import native
from tests.kernels import emulated
from tests.support import tiny


@pytest.fixture(scope="module", autouse=True)
def tiles() -> Iterator[None]:
    library = native.open_library(emulated.library(("kernels", "linear", "step"), ("amx",)))
    with mock.patch.object(native, "_library", return_value=library):
        yield


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("family", "inner"),
    [("llama", 96), ("llama-bias", 64), ("qwen3", 96), ("granite", 32), ("llama", 80)],  # 80: no whole panels of both
)
def test_hidden_states_and_tokens_bit_for_bit(family: str, inner: int, threads: int) -> None:
    """A prompt in chunks, then beside others, then alone: one row, few rows, a tile and more."""
    model = tiny.oracle(family, 7, intermediate_size=inner)
    runners = [tiny.runner(model, dtype="bfloat16", threads=threads) for _ in range(2)]
    assert runners[0].host.whole is not None
    runners[1].host.whole = None
    drivers = [tiny.Driver(runner) for runner in runners]
    for driver in drivers:
        for name, length in (("a", 5), ("b", 33), ("c", 70)):
            generator = torch.Generator().manual_seed(length)
            prompt = torch.randint(3, 200, (length,), generator=generator).tolist()
            driver.add(name, prompt, SamplingParams(temperature=0, prompt_logprobs=2))
    for share in ({"a": 5}, {"a": 1, "b": 33}, {"a": 1, "b": 1, "c": 70}, {"a": 1}):
        mine, theirs = (driver.step(share) for driver in drivers)
        assert mine.tokens == theirs.tokens
        assert mine.prompt_logprobs == theirs.prompt_logprobs
