"""Mixture of experts: every token goes through its own few of the layer's MLPs (Shazeer et al. 2017, arXiv:1701.06538).

A token's route and its sum depend on the token alone: scores are sorted with ties to the lower expert, the weights
are formed by exactly rounded operations in a fixed order, and the outputs are added in the order of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liushui.kernels.policy import Linear

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Router:
    """Softmax over the experts, then the best `top_k` of them."""

    product: Linear
    top_k: int
    normalise: bool
    """The weights of the chosen sum to 1; otherwise they are their share of all."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> (experts [T, k] int64, weights [T, k] float32), best first."""
        import torch

        from liushui.kernels.reference import exp, tree_sum

        scores, order = torch.sort(self.product(x).double(), dim=-1, descending=True, stable=True)
        shares = exp(scores - scores[:, :1])
        best = shares[:, : self.top_k]
        total = tree_sum(best if self.normalise else shares)
        return order[:, : self.top_k], (best / total).float()


@dataclass(frozen=True, slots=True)
class Experts:
    """x [T, H] -> [T, H]: the weighted sum of the experts that the router chose."""

    router: Router
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        chosen, weights = self.router(x)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for index in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.nonzero(chosen == index, as_tuple=True)
            out[rows] += self.experts[index](x[rows]).float() * weights[rows, place].unsqueeze(-1)
        return out.to(x.dtype)
