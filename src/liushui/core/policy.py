"""Who enters, who leaves, who yields: the choices of the scheduler, as small functions."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Protocol

from liushui.core.sequence import Sequence


def order(seq: Sequence) -> tuple[int, int]:
    """The one order of everything: priority, then arrival. Also a preempted sequence waits at its old place."""
    return seq.request.priority, seq.arrival


def victim(running: Seq[Sequence], needy: Sequence) -> Sequence | None:
    """Who gives up its blocks for `needy`: the last in order. None if that is `needy` itself: it waits.

    So the first in order is never preempted and can always have every block: somebody always gets ahead.
    """
    return running[-1] if running[-1] is not needy else None


class Policy(Protocol):
    """When sequences enter and leave the batch."""

    together: bool
    """Whether those who entered together leave together, and enter even if the step has no tokens left."""

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool) -> Iterator[Sequence]:
        """Those who may enter now, in order. Who is admitted is gone from `waiting` at the next `next()`;
        the first who does not fit ends the round: nobody overtakes."""
        ...

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        """Whether those who are done may leave the batch now."""
        ...


class Continuous:
    """流水席, the running banquet: sit down on arrival, leave when done."""

    together = False

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool) -> Iterator[Sequence]:
        while waiting:
            yield waiting[0]

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        return True


class Static:
    """The classic banquet: a table sits down together and rises together. The baseline to measure against.

    While a group is at the table, only its own preempted members may come back to it.
    """

    together = True

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool) -> Iterator[Sequence]:
        preempted = [seq for seq in waiting if seq.num_preemptions]
        yield from preempted
        while waiting and batch_empty and not preempted:
            yield waiting[0]

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        return not running and not any(seq.num_preemptions for seq in waiting)


POLICIES: dict[str, Policy] = {"continuous": Continuous(), "static": Static()}
