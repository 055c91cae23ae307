"""The products of `cuda.gemm` beside the vendor's: for many rows on Hopper, with SwiGLU in the same kernel.

Forms are compiled in the background once a row count has come that they may serve. Until they are there the vendor's
product serves; then they are tried as `vendor` tries its own: certified are the bits of the separate kernels, and the
fastest serves. Without NVRTC, or where a form cannot be had, what serves goes on serving.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liushui.kernels.cuda import CudaUnavailableError
from liushui.kernels.cuda.behind import Behind
from liushui.kernels.cuda.gemm import Form, Gemm, forms
from liushui.kernels.triton import products, vendor

Activation = Callable[[torch.Tensor], torch.Tensor]
MIN_ROWS = 64
FITS = (torch.bfloat16,)
"""Types of weights."""
_ALIGNED = 16
"""Bytes: what the copy engine asks of addresses."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form as a `vendor.Product`."""

    gemm: Gemm
    otherwise: vendor.Product
    """For what the copy engine cannot read."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        if (x.data_ptr() | weight.data_ptr()) % _ALIGNED or not weight.is_contiguous():
            return self.otherwise(x, weight, bias)
        columns = weight.shape[0] // 2 if self.gemm.form.gated else weight.shape[0]
        try:
            return self.gemm(x, weight, x.new_empty(x.shape[0], columns))
        except CudaUnavailableError as error:
            raise RuntimeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Separate:
    """Product and activation one after the other."""

    product: vendor.Product
    activation: Activation

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.activation(self.product(x, weight, bias))


@dataclass(frozen=True, slots=True)
class Untried:
    """Forms are to be tried for these rows of x and this weight."""

    choices: dict[int, vendor.Product | None]
    """Where what serves is to be kept."""
    rows: int
    weight: torch.Tensor
    gated: bool = False


class Forms(Behind):
    """The forms on one device. `note`: why no more are tried."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("gemm.cu", device)
        self._made: dict[Form, Gemm] = {}

    def wanted(self, rows: int, weight: torch.Tensor, gated: bool = False) -> list[Form]:
        """Those worth a trial."""
        n, k = weight.shape
        columns = n // 2 if gated else n
        fits = weight.dtype in FITS and k % 8 == 0 and columns % 8 == 0
        if not self.possible or rows < MIN_ROWS or rows not in products.BUCKETS or not fits:
            return []
        return forms(rows, columns, k, gated)

    def products(
        self, rows: int, weight: torch.Tensor, separate: vendor.Product, gated: bool
    ) -> list[vendor.Product] | None:
        """The forms that are wanted; None: they are being compiled. What cannot be had is left out, see `note`.

        `separate`: the kernels whose bits they have, for any tensors.
        """
        wanted = self.wanted(rows, weight, gated)
        try:
            codes = [self.code(form) for form in wanted]  # all are begun
            for form, code in zip(wanted, codes, strict=True):
                if code is None:
                    return None
                if form not in self._made:
                    self._made[form] = Gemm(form, self.device, code)
        except Exception as error:  # no compiler, no room, the process ends: what serves goes on serving
            self.give_up(error)
            return []
        return [Candidate(self._made[form], separate) for form in wanted]

    def report(self) -> list[str]:
        """A line where there might be some."""
        if self._pool is None:
            return []
        how = f"no more are tried ({self.note})" if self.note else "tried beside the vendor's once they are compiled"
        return [f"own products for many rows: {how}"]
