"""Numbers in memory for the native kernels where torch is not loaded.

To import torch takes longer than to read a small model, and 200 MB. An `Array` has as much of a tensor's face as the
kernels ask for, with numpy behind it. numpy knows no bfloat16, so a type is a name here: float32, bfloat16 (held as
uint16), int8, uint8, int32, int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

_HELD = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
_DTYPES = {name: np.dtype(held) for name, held in _HELD.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "bfloat16"}
"""numpy puts a name together anew each time it is asked: 4 us, many times a step."""


@cache
def type_name(dtype: Any) -> str:
    """float32 for both torch.float32 and "float32"."""
    return str(dtype).removeprefix("torch.")


def type_like(dtype: Any, name: str) -> Any:
    """The type `name` as torch's, if `dtype` is one of torch's, else the name."""
    if isinstance(dtype, str):
        return name
    import torch

    return getattr(torch, name)


def item_bytes(dtype: Any) -> int:
    """Bytes of one number."""
    return _DTYPES[type_name(dtype)].itemsize


class Array:
    """A contiguous block of numbers. `values` holds them, `dtype` says what they are."""

    __slots__ = ("dtype", "values")

    def __init__(self, values: np.ndarray, dtype: str | None = None) -> None:
        """`dtype`: needed for bfloat16 only."""
        self.dtype = dtype or _NAMES.get(values.dtype) or values.dtype.name
        if values.dtype != _DTYPES[self.dtype] or not values.flags.c_contiguous:
            raise ValueError(f"{values.dtype.name} is not contiguous memory of {self.dtype}")
        self.values = values

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: str) -> Array:
        return cls(np.empty(shape, _DTYPES[dtype]), dtype)

    @classmethod
    def cat(cls, arrays: Sequence[Array]) -> Array:
        """Stacked along the first dimension."""
        return cls(np.concatenate([array.values for array in arrays]), arrays[0].dtype)

    def new_empty(self, shape: Sequence[int]) -> Array:
        return Array.empty(shape, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def numel(self) -> int:
        return math.prod(self.values.shape)

    def dim(self) -> int:
        return self.values.ndim

    def is_contiguous(self) -> bool:
        return True

    def contiguous(self) -> Array:
        return self

    def data_ptr(self) -> int:
        return int(self.values.ctypes.data)

    def reshape(self, *shape: int) -> Array:
        return Array(self.values.reshape(shape), self.dtype)

    def __getitem__(self, index: int) -> Array:
        """One part along the first dimension, in the same memory."""
        return Array(self.values[index], self.dtype)

    def rows(self, indices: Sequence[int]) -> Array:
        """Those rows, copied."""
        return Array(self.values[list(indices)], self.dtype)

    def float(self) -> Array:
        """As float32; itself where it is that."""
        if self.dtype == "float32":
            return self
        if self.dtype != "bfloat16":
            raise ValueError(f"{self.dtype} is no floating point type")
        return Array((self.values.astype(np.uint32) << np.uint32(16)).view(np.float32))

    def tensor(self) -> Any:
        """torch's view of the same memory."""
        import torch

        return torch.from_numpy(self.values).view(getattr(torch, self.dtype))


class Arena:
    """Memory for many pieces that live equally long, taken in large runs: these lie on large pages, which are much
    fewer to ask the system for. What is not used of a run is never resident."""

    RUN = 64 * 2**20

    def __init__(self) -> None:
        self._run = np.empty(0, np.uint8)

    def take(self, count: int) -> Array:
        """[count] uint8, not set, from a multiple of 64 bytes on."""
        if count > self.RUN // 4:
            return Array(self._aligned(np.empty(count + 64, np.uint8))[:count])
        if count > self._run.nbytes:
            self._run = self._aligned(np.empty(self.RUN + 64, np.uint8))
        taken, self._run = self._run[:count], self._run[-(-count // 64) * 64 :]
        return Array(taken)

    @staticmethod
    def _aligned(run: np.ndarray) -> np.ndarray:
        return run[-run.ctypes.data % 64 :]
