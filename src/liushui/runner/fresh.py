"""KV memory that is there before a step needs it.

The first write to a page waits until the system has made it. Under a hypervisor that has to find memory itself, large
pages took 8 ms each: a step that met 24 of them took 200 ms longer, and whoever decoded in it waited. Blocks that were
never used are handed out in order, so a thread can stay ahead of the steps.
"""

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from liushui.layers.batch import KVCache

TOKENS_AHEAD = 4096
"""How far: two long prompts. More would be memory that a quiet server never uses."""
_BLOCKS = 32
"""Made in one go."""
_NICE = 10
"""Steps come first."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, Linux 5.14: as if every page were written to, with nothing changed (madvise(2))."""


def populate(address: int, size: int) -> bool:
    """Have the memory of `size` bytes made, whatever they hold. False: this system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    return bool(advise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _POPULATE_WRITE) == 0)


class Fresh:
    """Keeps the memory of the next blocks ready, on a thread of its own; ends with the cache, or where it cannot."""

    def __init__(self, kv: KVCache, ahead: int, populate: Callable[[int, int], bool] = populate) -> None:
        """`ahead`: blocks beyond the highest one used."""
        self.ready = 0
        """Blocks that have memory: 0 .. ready - 1."""
        self._kv, self._ahead, self._populate = weakref.ref(kv), ahead, populate
        self._num_blocks = int(kv.keys.shape[1])
        self._wanted, self._wake = min(ahead, self._num_blocks), threading.Event()
        weakref.finalize(kv, self._wake.set)
        self._wake.set()
        self.thread = threading.Thread(target=self._run, name="liushui-fresh", daemon=True)
        self.thread.start()

    def used(self, block: int) -> None:
        """A step writes to this block."""
        wanted = min(block + 1 + self._ahead, self._num_blocks)
        if wanted > self._wanted:
            self._wanted = wanted
            self._wake.set()

    def _run(self) -> None:
        if sys.platform.startswith("linux"):  # where a thread has a priority of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while self.ready < self._num_blocks and self._wake.wait():
            self._wake.clear()
            while self.ready < self._wanted or self._kv() is None:
                end = min(self.ready + _BLOCKS, self._wanted)
                if not self._make(end):
                    return
                self.ready = end

    def _make(self, end: int) -> bool:
        """Memory for the blocks before `end`; False: there is nothing more to do."""
        kv = self._kv()
        return kv is not None and all(self._populate(*piece) for piece in pieces(kv, self.ready, end))


def pieces(kv: KVCache, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of blocks start .. end - 1, layer by layer."""
    for part in (kv.keys, kv.values, *(kv.scales or ())):
        layers, blocks = part.shape[:2]
        block = part.nbytes // (layers * blocks)
        for layer in range(layers):
            yield part.data_ptr() + (layer * blocks + start) * block, (end - start) * block
