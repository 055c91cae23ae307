"""Memory of the KV cache is made ahead of the steps, and what is in it stays."""

import gc
import threading
from itertools import pairwise

import numpy as np
import pytest

from liushui.layers.batch import KVCache
from liushui.runner.fresh import Fresh, pieces, populate


def cache(blocks: int = 200, dtype: str = "float32") -> KVCache:
    return KVCache.allocate(2, blocks, 3, 4, 8, dtype)


class Made:
    """Stands in for the system."""

    def __init__(self, works: bool = True) -> None:
        self.pieces: list[tuple[int, int]] = []
        self.works = works
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, address: int, size: int) -> bool:
        self.begun.set()
        assert self.go.wait(60)
        self.pieces.append((address, size))
        return self.works


def settled(fresh: Fresh, ready: int) -> None:
    for _ in range(6000):
        if fresh.ready == ready:
            return
        fresh.thread.join(0.01)
    raise AssertionError(f"{fresh.ready} blocks are ready, not {ready}")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pieces_cover_every_byte_of_the_blocks_once(dtype: str) -> None:
    kv = cache(5, dtype)
    parts = [part.values for part in (kv.keys, kv.values, *(kv.scales or ()))]
    for part in parts:
        part.fill(0)
    for address, size in (*pieces(kv, 0, 2), *pieces(kv, 2, 5)):
        for part in parts:
            start = address - part.ctypes.data
            if 0 <= start < part.nbytes:
                part.reshape(-1).view(np.uint8)[start : start + size] += 1
    assert all((part.reshape(-1).view(np.uint8) == 1).all() for part in parts)


def test_it_stays_ahead_of_what_is_used_and_makes_nothing_twice() -> None:
    kv, made = cache(200), Made()
    fresh = Fresh(kv, 40, made)
    settled(fresh, 40)
    fresh.used(0)
    fresh.used(9)
    settled(fresh, 50)
    fresh.used(3)
    fresh.used(190)
    settled(fresh, 200)
    fresh.thread.join(60)
    assert not fresh.thread.is_alive()
    size = kv.keys.nbytes // (2 * 200)
    blocks = sorted((address, length) for address, length in made.pieces)
    assert sum(length for _, length in blocks) == 2 * 2 * 200 * size
    assert all(first + length <= second for (first, length), (second, _) in pairwise(blocks))


def test_where_the_system_cannot_it_asks_once() -> None:
    kv, made = cache(), Made(works=False)
    fresh = Fresh(kv, 40, made)
    fresh.thread.join(60)
    assert (fresh.thread.is_alive(), len(made.pieces), fresh.ready) == (False, 1, 0)
    fresh.used(100)


def test_it_ends_with_the_cache() -> None:
    kv = cache()
    fresh = Fresh(kv, 40, Made())
    settled(fresh, 40)
    del kv
    gc.collect()
    fresh.thread.join(60)
    assert not fresh.thread.is_alive()


def test_what_is_in_the_memory_stays() -> None:
    numbers = np.arange(100_000, dtype=np.int64)
    populate(numbers.ctypes.data + 12, numbers.nbytes - 12)
    assert (numbers == np.arange(100_000)).all()
