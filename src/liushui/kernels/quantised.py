"""Weights as a GGUF file holds them: rows of blocks of integers and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liushui.kernels.arrays import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AS_BFLOAT16 = " as bfloat16"
"""Behind a form's name, or alone: integers are expanded when they are multiplied, with the bits that the same values in
bfloat16 give (AMX)."""


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Consecutive rows of a weight [N, K], all of one GGUF type."""

    rows: Tensor | Array
    """uint8 [N, bytes of a row], contiguous."""
    kind: str
    """GGUF's name of the type, such as Q4_1."""
    shape: tuple[int, int]
    dequantise: Callable[[torch.dtype], Tensor]
    """The rows as floating point numbers, [N, K]."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight [N, K] in one or more pieces, one below the other."""

    parts: tuple[QuantisedRows, ...]
    form: str | None = None
    """What a product is to hold it as (`native_linear.FORMATS`), if not as it is."""

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.kind for part in self.parts))

    @property
    def nbytes(self) -> int:
        return sum(part.rows.nbytes for part in self.parts)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[N, K]."""
        import torch

        return torch.cat([part.dequantise(dtype) for part in self.parts])

    @classmethod
    def stack(cls, weights: Sequence[Quantised], form: str | None = None) -> Quantised:
        """One below the other; neighbours of the same type become one piece."""
        parts: list[QuantisedRows] = []
        for part in (part for weight in weights for part in weight.parts):
            if parts and parts[-1].kind == part.kind:
                parts[-1] = _joined(parts[-1], part)
            else:
                parts.append(part)
        return cls(tuple(parts), form)


def _joined(above: QuantisedRows, below: QuantisedRows) -> QuantisedRows:
    shape = above.shape[0] + below.shape[0], above.shape[1]
    if isinstance(above.rows, Array) and isinstance(below.rows, Array):
        rows: Tensor | Array = Array.cat([above.rows, below.rows])
    else:
        import torch

        rows = torch.cat([above.rows, below.rows])  # type: ignore[list-item]
    return QuantisedRows(rows, above.kind, shape, lambda dtype: Quantised((above, below)).dequantise(dtype))
