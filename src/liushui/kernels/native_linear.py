"""The native products: weights packed once, then x @ weight.T + bias with an order of sums that ignores the batch."""

import ctypes
from ctypes import c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from liushui.kernels.ops import PackedLinear

_ARGUMENTS: dict[str, list[Any]] = {
    "panel": [],
    "pack": [c_int, c_void_p, c_long, c_long, c_void_p],
    "linear": [c_int, c_void_p, c_long, c_long, c_void_p, c_void_p, c_void_p, c_long],
}


class NativeProducts:
    """Packing and products of one instruction set. Wrong types or shapes raise `ValueError`."""

    def __init__(self, library: ctypes.CDLL, isa: str, threads: int) -> None:
        functions = {}
        for name, arguments in _ARGUMENTS.items():
            function = library[f"liushui_{name}_{isa}"]  # an own object, not the shared attribute
            function.argtypes, function.restype = arguments, c_int
            functions[name] = function
        self._pack, self._linear = functions["pack"], functions["linear"]
        self.threads = threads
        self._panel = functions["panel"]()
        self._layout = f"float32 panels of {self._panel}"

    def pack(self, weight: Tensor) -> PackedLinear | None:
        """float32 [N, K] in panels of columns; None for bfloat16."""
        if weight.dtype != torch.float32:
            return None
        if not weight.is_contiguous():
            raise ValueError("native kernels take contiguous tensors")
        width, inner = weight.shape
        panels = -(-width // self._panel)
        packed = torch.empty((panels, inner, self._panel), dtype=torch.float32)
        self._pack(self.threads, weight.data_ptr(), width, inner, packed.data_ptr())
        return PackedLinear(packed, width, inner, weight.dtype, self._layout)

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N]."""
        rows, inner = x.shape
        width = packed.out_features
        if packed.kind != self._layout:
            raise ValueError(f"linear: packed as {packed.kind}, not {self._layout}")
        if x.dtype is not packed.dtype or (bias is not None and bias.dtype is not packed.dtype):
            raise ValueError(f"native kernels take one type: the weight is packed for {packed.dtype}")
        if inner != packed.in_features:
            raise ValueError("linear: x is not [M, K]")
        if bias is not None and bias.numel() != width:
            raise ValueError("linear: bias is not [N]")
        if not x.is_contiguous() or (bias is not None and not bias.is_contiguous()):
            raise ValueError("native kernels take contiguous tensors")
        out = x.new_empty((rows, width))
        self._linear(
            self.threads, x.data_ptr(), rows, inner, packed.data.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(), width,
        )  # fmt: skip
        return out
