"""The one home of every choice that could make an answer depend on the batch (DESIGN, decision 8)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liushui.kernels.linear import CertifiedLinear, PlainLinear, RowCertificate
from liushui.kernels.ops import Ops, PackedLinear

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class OpsLinear:
    """x [M, K] -> [M, N] by the implementation's own product."""

    ops: Ops
    packed: PackedLinear
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.packed, self.bias)


class KernelPolicy:
    """Chooses the kernels of a model.

    `invariant`: every sum is formed in an order that ignores the batch: own kernels by construction, the vendor's
    product where certified. `fast`: the vendor's product as it comes.
    """

    def __init__(self, ops: Ops, numerics: str = "invariant") -> None:
        self.ops = ops
        self.numerics = numerics
        self._certificates: dict[tuple[int, int, torch.dtype, bool], RowCertificate] = {}
        self._linear_kinds: set[str] = set()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """A function x [M, K] -> [M, N] for weight [N, K]; the weight may be repacked."""
        weight = weight.contiguous()
        if self.numerics == "fast":
            self._linear_kinds.add("vendor product, unconstrained")
            return PlainLinear(weight, bias)
        packed = self.ops.pack_linear(weight, bias)
        if packed is not None:
            self._linear_kinds.add(f"{self.ops.name} product")
            return OpsLinear(self.ops, packed, None if packed.has_bias else bias)
        self._linear_kinds.add("vendor product in certified row counts")
        key = (*weight.shape, weight.dtype, bias is None)
        certificate = self._certificates.setdefault(key, RowCertificate())
        return CertifiedLinear(weight, bias, certificate)

    @property
    def uses_vendor(self) -> bool:
        """Whether a product of those chosen so far is the vendor's."""
        return any(kind.startswith("vendor") for kind in self._linear_kinds)

    def describe(self) -> str:
        return f"{self.numerics} numerics: {self.ops.name} kernels, " + ", ".join(sorted(self._linear_kinds))
