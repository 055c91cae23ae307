"""A step in one native call, with software in place of instructions: the bits of the operations one by one."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from liushui.core.request import SamplingParams
from liushui.kernels import native
from liushui.runner.runner import Runner
from tests.kernels import emulated
from tests.support import blocks, tiny


@pytest.fixture(scope="module", autouse=True, params=["amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    library = native.open_library(emulated.library(("kernels", "linear", "step"), (request.param,)))
    with mock.patch.object(native, "_library", return_value=library):
        yield


@pytest.mark.parametrize("isa", ["amx", "avx512bf16"], indirect=True)
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
    compare(runners)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "qwen3"])
def test_expanded_blocks_give_the_answers_of_bfloat16(family: str) -> None:
    """In one call, in operations one by one, and with the weights dequantised at load."""
    model = blocks.oracle(family, 7)
    forms = ("native", "native", "bf16")
    runners = [blocks.runner(model, dtype="bfloat16", weights=form, threads=2) for form in forms]
    assert "as bfloat16" in runners[0].model.layers[0].mlp.down.packed.kind
    runners[1].host.whole = None
    compare(runners)


@pytest.mark.parametrize(
    "kinds",
    [{"gate_proj": "Q8_0", "up_proj": "Q8_0"}, {"gate_proj": "Q8_0", "up_proj": "Q8_0", "down_proj": "Q4_1"}],
    ids=["same kind", "other kind"],
)
def test_gates_whose_weight_is_the_second_factor(kinds: dict[str, str]) -> None:
    """What passes them is what the weight after them takes, of the same kind or not."""
    with mock.patch.dict(blocks.KINDS, kinds):
        model = blocks.oracle("llama-bias", 5)
        runners = [blocks.runner(model, dtype="bfloat16", weights="native", threads=2) for _ in range(2)]
    runners[1].host.whole = None
    compare(runners)


def compare(runners: list[Runner]) -> None:
    drivers = [tiny.Driver(runner) for runner in runners]
    for driver in drivers:
        for name, length in (("a", 5), ("b", 33), ("c", 70)):
            generator = torch.Generator().manual_seed(length)
            prompt = torch.randint(3, 200, (length,), generator=generator).tolist()
            driver.add(name, prompt, SamplingParams(temperature=0, prompt_logprobs=2))
    for share in ({"a": 5}, {"a": 1, "b": 33}, {"a": 1, "b": 1, "c": 70}, {"a": 1}):
        mine, *others = (driver.step(share) for driver in drivers)
        for theirs in others:
            assert mine.tokens == theirs.tokens
            assert mine.prompt_logprobs == theirs.prompt_logprobs
