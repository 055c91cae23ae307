"""Routing: softmax and the best experts of each token, alone or in company the same bits."""

import pytest
import torch

from liushui.kernels.policy import KernelPolicy
from liushui.kernels.reference import TorchOps
from liushui.layers.experts import Experts, Router


def _given(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_the_softmax_of_the_best(normalise: bool) -> None:
    scores = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 3
    chosen, weights = Router(_given, 4, normalise)(scores)
    best, expected = torch.softmax(scores, dim=-1).topk(4)
    if normalise:
        best = best / best.sum(dim=-1, keepdim=True)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, best)


def test_ties_go_to_the_lower_expert() -> None:
    chosen, weights = Router(_given, 2, True)(torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert chosen.tolist() == [[1, 2], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_sum_ignores_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    policy = KernelPolicy(TorchOps(1))
    products = [policy.linear(torch.randn(24, 24, generator=generator).to(dtype)) for _ in range(8)]
    gate = policy.linear(torch.randn(8, 24, generator=generator).to(dtype))
    experts = Experts(Router(gate, 3, False), products)
    x = torch.randn(40, 24, generator=generator).to(dtype)
    together = experts(x)
    assert together.dtype == dtype
    for rows in ([0], [39], [7, 3], list(range(10, 40))):
        assert torch.equal(experts(x[rows]), together[rows])
