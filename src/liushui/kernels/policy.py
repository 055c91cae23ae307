"""The one home of every choice that could make an answer depend on the batch (DESIGN, decision 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from liushui.kernels.arrays import type_name
from liushui.kernels.ops import Ops, PackedLinear
from liushui.kernels.quantised import AS_BFLOAT16, Quantised

if TYPE_CHECKING:
    import torch

    from liushui.kernels.linear import RowCertificate

Linear = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class OpsLinear:
    """x [M, K] -> [M, N] by the implementation's own product."""

    ops: Ops
    packed: PackedLinear
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.packed, self.bias)

    def then(self, x: torch.Tensor, activation: Linear) -> torch.Tensor:
        """`activation` of the product: by one kernel where the implementation has one."""
        together = getattr(self.ops, "linear_then", None)
        return activation(self(x)) if together is None else together(x, self.packed, self.bias, activation)


@dataclass(frozen=True, slots=True)
class DenseTable:
    """ids [T] -> rows [T, H] of a tensor [vocabulary, H], a tensor of their own."""

    weight: torch.Tensor

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@dataclass(frozen=True, slots=True)
class PackedTable:
    """The same from a packed weight: rows are dequantised when they are looked up."""

    ops: Ops
    packed: PackedLinear
    dtype: torch.dtype

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.ops.embed(ids, self.packed, self.dtype)


class KernelPolicy:
    """Chooses the kernels of a model.

    `invariant`: every sum is formed in an order that ignores the batch: own kernels by construction, the vendor's
    product where certified. `fast`: the vendor's product as it comes.
    """

    def __init__(
        self, ops: Ops, numerics: str = "invariant", quantise: str | None = None, *, expand: bool = False
    ) -> None:
        """`quantise` (int8, int4): hold the weights of products in groups of 32 integers. `expand`: multiply integers
        as bfloat16."""
        self.ops, self.quantise, self.expand = ops, quantise, expand
        self.numerics = numerics
        self._certificates: dict[tuple[int, int, torch.dtype, bool], RowCertificate] = {}
        self._linear_kinds: set[str] = set()

    def linear(
        self, weight: torch.Tensor | Quantised, bias: torch.Tensor | None = None, *, exact: bool = False
    ) -> Linear:
        """A function x [M, K] -> [M, N] for weight [N, K]; the weight may be repacked. `exact`: never quantised."""
        quantise = None if exact else self.quantise
        if not isinstance(weight, Quantised):
            weight = weight.float().contiguous() if quantise else weight.contiguous()
            if self.numerics == "fast":
                from liushui.kernels.linear import PlainLinear

                self._linear_kinds.add("vendor product, unconstrained")
                return PlainLinear(weight, bias)
        packed = self.ops.pack_linear(weight, bias, self._form(weight, quantise))
        if packed is not None:
            held = packed.kind.rpartition(": ")[2] if self.ops.name == "native" else ""
            self._linear_kinds.add(f"{self.ops.name} product" + (f" ({held})" if held else ""))
            return OpsLinear(self.ops, packed, None if packed.has_bias else bias)
        if isinstance(weight, Quantised):
            raise ValueError(f"{self.ops.name} kernels have no product for {', '.join(weight.kinds)}")
        from liushui.kernels.linear import CertifiedLinear, RowCertificate

        self._linear_kinds.add("vendor product in certified row counts")
        key = (*weight.shape, weight.dtype, bias is None)
        certificate = self._certificates.setdefault(key, RowCertificate())
        return CertifiedLinear(weight, bias, certificate)

    def _form(self, weight: torch.Tensor | Quantised, quantise: str | None) -> str | None:
        form = quantise or (weight.form if isinstance(weight, Quantised) else None)
        integers = form in ("int8", "int4") or (form is None and isinstance(weight, Quantised))
        return (form or "") + AS_BFLOAT16 if self.expand and integers else form

    def table(
        self, weight: torch.Tensor | Quantised, dtype: torch.dtype, product: Linear | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """ids [T] -> rows [T, H] of weight [vocabulary, H] in `dtype`. `product`: with that weight, if there is one."""
        if self.ops.name == "native" and isinstance(product, OpsLinear):
            return PackedTable(self.ops, product.packed, dtype)
        if isinstance(weight, Quantised):
            if weight.form in ("int8", "int4"):  # looked up, not multiplied: nothing is rounded
                weight = replace(weight, form=type_name(dtype))
            packed = self.ops.pack_linear(weight)
            if packed is not None:
                return PackedTable(self.ops, packed, dtype)
            weight = weight.dequantise(dtype)
        weight = weight.to(dtype)
        if self.ops.name == "triton":
            return PackedTable(self.ops, self.ops.pack_linear(weight), dtype)  # type: ignore[arg-type]
        return DenseTable(weight)

    @property
    def uses_vendor(self) -> bool:
        """Whether a product of those chosen so far is the vendor's."""
        return any(kind.startswith("vendor") for kind in self._linear_kinds)

    def describe(self) -> str:
        return f"{self.numerics} numerics: {self.ops.name} kernels, " + ", ".join(sorted(self._linear_kinds))
