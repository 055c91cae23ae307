"""Every implementation that this machine can run."""

import pytest
import torch

from liushui.errors import LiushuiError
from liushui.kernels.ops import Ops, load_ops


def implementations() -> dict[str, Ops]:
    made: dict[str, Ops] = {"torch": load_ops("torch", 2)}
    for isa in ("generic", "avx2", "avx512", "avx512bf16", "amx"):
        try:
            made[isa] = load_ops("native", 2, isa=isa)
        except LiushuiError:
            continue
    return made


IMPLEMENTATIONS = implementations()


@pytest.fixture(params=list(IMPLEMENTATIONS))
def ops(request: pytest.FixtureRequest) -> Ops:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned_outputs():
    """`torch.empty` gives NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
