"""A checkpoint's rows handed to a model without torch: unpacked and packed by the native library alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from liushui.kernels.arrays import Array
from liushui.kernels.native_linear import NativeProducts, can_unpack
from liushui.kernels.quantised import Quantised, QuantisedRows
from liushui.layers.weights import Weights


class NotPlainError(Exception):
    """A tensor that only torch can make of what the file holds."""


class RowWeights(Weights):
    """`Weights` whose tensors are `Array`s, and whose products take the file's rows as they are."""

    def __init__(
        self,
        names: Iterable[str],
        shape: Callable[[str], tuple[int, ...]],
        rows: Callable[[str], QuantisedRows | None],
        products: NativeProducts,
        dtype: str,
        form: str,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        """`dtype`: of what is taken. `form`: what products hold their weights as (`native_linear.FORMATS`), but for
        those of the types `kept`, which stay as they are. Everything may raise `NotPlainError`."""
        self.dtype: Any = dtype
        self._left, self._shape, self._rows = set(names), shape, rows
        self._products, self._form, self._kept = products, form, kept

    def close(self) -> None:
        pass

    def take(self, name: str, *shape: int, dtype: Any = None) -> Any:
        self._claim(name, shape)
        return self._products.unpack(self._part(name), dtype or self.dtype).reshape(*shape)

    def take_linear(self, names: Sequence[str], rows: Sequence[int], inputs: int) -> Any:
        for name, count in zip(names, rows, strict=True):
            self._claim(name, (count, inputs))
        found = [self._part(name) for name in names]
        if all(part.kind in self._kept for part in found):
            return Quantised.stack([Quantised((part,)) for part in found])
        if self._form in ("int8", "int4"):  # made from floating point numbers
            found = [self._floats(part) for part in found]
        return Quantised.stack([Quantised((part,)) for part in found], self._form)

    def take_rows(self, names: Iterable[str], rows: Iterable[int], *rest: int) -> Any:
        return Array.cat([self.take(name, n, *rest) for name, n in zip(names, rows, strict=True)])

    def take_floats(self, name: str, count: int) -> np.ndarray:
        values: np.ndarray = self.take(name, count, dtype="float32").values
        return values

    def place(self, values: np.ndarray) -> Any:
        return Array(values)

    def _part(self, name: str) -> QuantisedRows:
        found = self._rows(name)
        if found is None or not can_unpack(found.kind):
            raise NotPlainError(name)
        return found

    def _floats(self, part: QuantisedRows) -> QuantisedRows:
        return QuantisedRows(self._products.unpack(part, "float32"), "F32", part.shape, part.dequantise)
