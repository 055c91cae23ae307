"""CUDA C++ files that are compiled behind the steps: until a form of one is there, what serves goes on serving."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import ClassVar, Protocol

import torch

from liushui.kernels.cuda import CudaUnavailableError
from liushui.kernels.cuda.nvrtc import machine_code

HOPPER = (9, 0)
"""The compute capability that the files are written for."""


class Compilable(Protocol):
    """What a file is compiled for; hashable."""

    def defines(self) -> Mapping[str, int]:
        """Its macros."""
        ...


class Behind:
    """The forms of one file, for one device; each is compiled in a thread of its own, from its first use on."""

    _code: ClassVar[dict[tuple[str, Compilable], Future[bytes]]] = {}
    """For all devices: what a model without weights asked for serves the one with weights."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.source, self.device = source, device
        self.note = ""
        """Why no form serves any more."""
        on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
        self._pool = ThreadPoolExecutor(1, f"liushui-{source}") if on_hopper else None

    @property
    def possible(self) -> bool:
        """Whether forms may serve."""
        return self._pool is not None and not self.note

    def code(self, form: Compilable) -> bytes | None:
        """None: it is being compiled. Raises what the compilation raised, and `CudaUnavailableError`."""
        key = self.source, form
        if key not in self._code:
            if self._pool is None:
                raise CudaUnavailableError(f"{self.source} is for GPUs of compute capability {HOPPER[0]}.{HOPPER[1]}")
            self._code[key] = self._pool.submit(machine_code, self.source, form.defines(), HOPPER)
        future = self._code[key]
        return future.result() if future.done() else None

    def give_up(self, error: Exception) -> None:
        """No form serves from now on."""
        self.note = (str(error) or repr(error)).splitlines()[0]

    def wait(self) -> None:
        """For what is being compiled."""
        wait_for([future for (source, _), future in self._code.items() if source == self.source])
