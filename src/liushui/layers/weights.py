"""Named tensors handed to a model while it builds itself: each asked for once, by name and shape."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from liushui.errors import WeightError
from liushui.kernels.quantised import Quantised

if TYPE_CHECKING:
    import torch

# Buffers that old checkpoints carry although they can be computed.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


READ_AHEAD_BYTES = 128 * 2**20
"""Decoded tensors that may wait for the model: enough to keep both busy, little beside the model itself."""

Load = Callable[[str, "torch.dtype"], "torch.Tensor"]
Read = Callable[[str], "torch.Tensor | Quantised"]


class ReadAhead:
    """Decodes tensors on a second thread, in the order of the checkpoint, while the model packs those it has.

    Models ask in nearly that order. A tensor asked for out of turn is decoded at once by the asker, so the order is
    a matter of speed alone.
    """

    def __init__(self, names: Iterable[str], read: Read) -> None:
        self._read = read
        self._queue = list(names)
        self._ahead: dict[str, Future[torch.Tensor | Quantised]] = {}
        self._taken: set[str] = set()
        self._bytes = 0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="liushui-read-ahead", daemon=True)
        self._thread.start()

    def take(self, name: str) -> torch.Tensor | Quantised:
        """The tensor `name`. Raises what decoding it raised."""
        with self._change:
            self._taken.add(name)
            future = self._ahead.pop(name, None)
        if future is None:
            return self._read(name)
        tensor = future.result()
        with self._change:
            self._bytes -= tensor.nbytes
            self._change.notify()
        return tensor

    def close(self) -> None:
        """Stop reading and drop what is left."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()
        self._ahead.clear()

    def _run(self) -> None:
        for name in self._queue:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._bytes < READ_AHEAD_BYTES)
                if self._closed:
                    return
                if name in self._taken:
                    continue
                future: Future[torch.Tensor | Quantised] = Future()
                self._ahead[name] = future
            try:
                tensor = self._read(name)
            except Exception as error:  # the asker's to see
                future.set_exception(error)
                continue
            with self._change:
                self._bytes += tensor.nbytes
            future.set_result(tensor)


class Weights:
    """Strict access to a checkpoint: a missing or misshapen tensor raises at once, an extra one at `finish`."""

    def __init__(
        self,
        names: Iterable[str],
        shape: Callable[[str], tuple[int, ...]],
        load: Load,
        dtype: torch.dtype,
        device: torch.device | None = None,
        matrix_dtype: torch.dtype | None = None,
        blocks: Callable[[str], Quantised | None] | None = None,
    ) -> None:
        """`dtype`: of what is taken; `device`: where it goes (default: the CPU).

        `matrix_dtype`: of the weights of products, if another. `blocks`: a matrix as the file holds it, or None for
        those to be dequantised.
        """
        import torch

        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.matrix_dtype, self._blocks = matrix_dtype or dtype, blocks
        ordered = list(names)
        self._left = set(ordered)
        self._shape = shape
        self._load = load
        self._ahead = ReadAhead(ordered, self._read)

    def close(self) -> None:
        """Free what was read ahead; no tensor can be taken afterwards."""
        self._ahead.close()

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, which must have `shape`."""
        self._claim(name, shape)
        if dtype not in (None, self.dtype):
            return self._load(name, dtype).to(self.device)
        return _dense(self._ahead.take(name), self.dtype).to(self.device, self.dtype)

    def take_linear(self, names: Sequence[str], rows: Sequence[int], inputs: int) -> torch.Tensor | Quantised:
        """The weight of a product, [sum of rows, inputs]: tensors [rows[i], inputs] stacked along the rows."""
        for name, count in zip(names, rows, strict=True):
            self._claim(name, (count, inputs))
        found = [self._ahead.take(name) for name in names]
        whole = [weight for weight in found if isinstance(weight, Quantised)]
        if len(whole) == len(found):
            return Quantised.stack(whole)
        dense = [_dense(weight, self.matrix_dtype).to(self.device, self.matrix_dtype) for weight in found]
        if len(dense) == 1:
            return dense[0]
        import torch

        return torch.cat(dense)

    def take_floats(self, name: str, count: int) -> np.ndarray:
        """The vector `name`, [count] float32."""
        import torch

        values: np.ndarray = self.take(name, count, dtype=torch.float32).cpu().numpy()
        return values

    def place(self, values: np.ndarray) -> torch.Tensor:
        """What a model computed itself, where it takes its weights."""
        import torch

        return torch.from_numpy(values).to(self.device)

    def _claim(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._left:
            raise WeightError(f"tensor {name} {list(shape)} is missing from the checkpoint")
        found = tuple(self._shape(name))
        if found != shape:
            raise WeightError(f"tensor {name} has shape {list(found)}, the model's config asks for {list(shape)}")
        self._left.discard(name)

    def _read(self, name: str) -> torch.Tensor | Quantised:
        matrix = len(self._shape(name)) > 1
        blocks = self._blocks(name) if matrix and self._blocks is not None else None
        return blocks or self._load(name, self.matrix_dtype if matrix else self.dtype)

    def take_rows(self, names: Iterable[str], rows: Iterable[int], *rest: int) -> torch.Tensor:
        """Several tensors [rows[i], *rest] as one, stacked along the rows: products that share their input."""
        import torch

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


def _dense(weight: torch.Tensor | Quantised, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantise(dtype) if isinstance(weight, Quantised) else weight
