"""Named tensors handed to a model while it builds itself: each asked for once, by name and shape."""

import re
from collections.abc import Callable, Iterable

import torch

from liushui.errors import WeightError

# Buffers that old checkpoints carry although they can be computed.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


class Weights:
    """Strict access to a checkpoint: a missing or misshapen tensor raises at once, an extra one at `finish`."""

    def __init__(
        self,
        names: Iterable[str],
        shape: Callable[[str], tuple[int, ...]],
        load: Callable[[str, torch.dtype], torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self._left = set(names)
        self._shape = shape
        self._load = load

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, which must have `shape`."""
        if name not in self._left:
            raise WeightError(f"tensor {name} {list(shape)} is missing from the checkpoint")
        found = tuple(self._shape(name))
        if found != shape:
            raise WeightError(f"tensor {name} has shape {list(found)}, the model's config asks for {list(shape)}")
        self._left.discard(name)
        return self._load(name, dtype or self.dtype)

    def take_rows(self, names: Iterable[str], rows: Iterable[int], *rest: int) -> torch.Tensor:
        """Several tensors [rows[i], *rest] as one, stacked along the rows: products that share their input."""
        return torch.cat([self.take(name, n, *rest) for name, n in zip(names, rows, strict=True)])

    def drop(self, name: str) -> None:
        """Declare that `name` may be in the checkpoint and is not needed."""
        self._left.discard(name)

    def strip_prefix(self, prefix: str) -> str:
        """`prefix` if the checkpoint's names carry it, else '' (base-model checkpoints leave it out)."""
        return prefix if any(name.startswith(prefix) for name in self._left) else ""

    def finish(self) -> None:
        extra = sorted(name for name in self._left if not _IGNORED.search(name))
        if extra:
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise WeightError(f"the checkpoint has tensors that this architecture does not use: {shown}")
