"""Where requests come from, one at a time: a list that is there, or a source that may keep its reader waiting."""

import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)

GRACE = 0.002
"""Seconds that a step waits for a source that is being read: enough for one that only computes, nothing to others."""
LOOK = 0.2
"""Seconds after which a wait is begun anew: a Ctrl-C in the moment before it would not be seen within it."""
CLOSING = 0.5
"""Seconds that the end waits for a reader in the middle of an item."""


class NotYet(Exception):
    """There is no item at the moment; ask again."""


class Supply(Protocol[Item]):
    """Items, as long as somebody takes them."""

    def take(self, wait: bool) -> Item:
        """The next item. `wait`: there is nothing else to do. Raises `NotYet` (never if `wait`), `StopIteration` at
        the end, and what the source raises."""
        ...

    def close(self) -> None:
        """No more items will be taken."""
        ...


class Direct(Generic[T]):
    """Reads in the caller's thread."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source

    def take(self, wait: bool) -> T:
        return next(self._source)

    def close(self) -> None:
        pass


class Ahead(Generic[T]):
    """Reads in a thread of its own, an item when one is asked for and none before: who runs goes on meanwhile."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._change = threading.Condition()
        self._asked = self._closed = self._done = False
        self._items: list[T] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def take(self, wait: bool) -> T:
        with self._change:
            timeout = LOOK if wait else 0.0 if self._asked else GRACE
            if not self._asked and not self._done:
                self._asked = True
                self._change.notify_all()
                if self._thread is None:  # it may be stuck in the source for ever: nobody must wait for it
                    self._thread = threading.Thread(target=self._read, name="liushui-source", daemon=True)
                    self._thread.start()
            while not self._change.wait_for(lambda: self._items or self._done, timeout) and wait:
                pass
            if self._items:
                self._asked = False
                return self._items.pop()
            if not self._done:
                raise NotYet
            failure, self._failure = self._failure, None
            raise failure if failure is not None else StopIteration

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSING)

    def _read(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._asked and not self._items))
                if self._closed:
                    return
            try:
                item = next(self._source)
            except BaseException as error:
                with self._change:
                    self._done = True
                    self._failure = None if isinstance(error, StopIteration) else error
                    self._change.notify_all()
                return
            with self._change:
                self._items.append(item)
                self._change.notify_all()
