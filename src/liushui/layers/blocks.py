"""The parts of a decoder layer. Families differ in which parts they put together, not in flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liushui.kernels.ops import Ops
from liushui.kernels.policy import Linear, OpsLinear

if TYPE_CHECKING:
    import torch

Activation = Callable[["torch.Tensor"], "torch.Tensor"]
"""[T, 2 I] -> [T, I]: a function of the first half, times the second half."""
ReadStream = Callable[["torch.Tensor | None", "torch.Tensor"], "torch.Tensor"]
"""(update [T, H] or None, residual [T, H]) -> [T, H]: adds the update to the residual in place, and reads the sum."""


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467); a `ReadStream`."""

    ops: Ops
    weight: torch.Tensor
    eps: float
    unit_offset: bool = False
    """The factor is 1 + weight."""

    def __call__(self, update: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        if update is None:
            return self.alone(residual)
        return self.ops.rms_norm(update, self.weight, self.eps, residual, self.unit_offset)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H], normed."""
        return self.ops.rms_norm(x, self.weight, self.eps, None, self.unit_offset)


def as_it_is(update: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """The `ReadStream` of families that norm what a sub-layer gives, not what it reads."""
    return residual if update is None else residual.add_(update)


@dataclass(frozen=True, slots=True)
class Then:
    """`second` of what `first` gives."""

    first: Callable[..., torch.Tensor]
    second: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, *inputs: Any) -> torch.Tensor:
        return self.second(self.first(*inputs))


@dataclass(frozen=True, slots=True)
class Scale:
    """x times `factor`, in place."""

    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.factor)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """x [T, H] -> [T, H]: f(x Wg) * (x Wu), then Wd (Shazeer 2020, arXiv:2002.05202)."""

    gate_up: Linear
    activation: Activation
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.gate_up, OpsLinear):
            return self.down(self.gate_up.then(x, self.activation))
        return self.down(self.activation(self.gate_up(x)))


@dataclass(frozen=True, slots=True)
class NormedQueryKey:
    """x [T, H] -> qkv [T, (Hq + 2 Hk) D], all of a token's query, and all of its key, RMS-normed as one row."""

    product: Linear
    rows: tuple[int, int, int]
    """Widths of q, k and v."""
    query: RMSNorm
    key: RMSNorm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        q, k, v = torch.split(self.product(x), list(self.rows), dim=-1)
        return torch.cat([self.query.alone(q.contiguous()), self.key.alone(k.contiguous()), v], dim=-1)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Both sub-layers read the residual stream, and what they give is added to it by who reads it next."""

    attention_input: ReadStream
    attention: Callable[..., torch.Tensor]
    """(x [T, H], layer, KVCache, BatchTensors) -> [T, H]."""
    mlp_input: ReadStream
    mlp: Callable[[torch.Tensor], torch.Tensor]
