"""What a start can do before torch is there, or beside its import: that takes seconds, most of them Python's own."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection within: what is imported stays, and looking through it takes a quarter of an import.

    What is there at the end is left out of later collections, the first time in a process: with torch among it a full
    one takes 0.1 s, amid a step.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def bring_torch(gpu: bool) -> None:
    """Import torch. `gpu`: one is likely to be used."""
    if gpu:
        compilers_tools()
    import torch  # noqa: F401


@cache
def compilers_tools() -> threading.Thread:
    """A thread that readies, once a process, what the first kernel waits for: the device's driver, what Triton reaches
    it by, and Triton's key, a hash of its whole library, a second's work."""
    thread = threading.Thread(target=_ready_tools, name="liushui-compiler-tools", daemon=True)
    thread.start()
    return thread


def _ready_tools() -> None:
    with suppress(ImportError):  # a matter of speed alone
        from liushui.kernels.triton import launchers

        if _wake_driver():
            launchers.make_driver()
        from triton.runtime.cache import triton_key

        triton_key()


def _wake_driver() -> bool:
    """Whether there is a driver, and it finds a GPU."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False
