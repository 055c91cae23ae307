"""Who enters, who leaves, who yields: the choices of the scheduler, as small functions."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from liushui.core.request import Request
from liushui.core.sequence import Sequence


def rank(request: Request, arrival: int, ageing: float | None) -> tuple[float, int]:
    """A sequence's place in the one order of everything, smallest first; it never changes.

    Without ageing: by priority, then by arrival. With it, every `ageing` seconds of waiting count as one step of
    priority: at time t that is priority - (t - arrival_time) / ageing, and since t is the same for all, the order is
    that of priority + arrival_time / ageing. So a request of priority p is overtaken at most by those of priority q < p
    that come within (p - q) * ageing seconds after it, and nobody starves.
    """
    return request.priority + (request.arrival_time / ageing if ageing else 0.0), arrival


def order(seq: Sequence) -> tuple[float, int]:
    """The one order: of the queue (a tenant's own), of the batch, of giving up blocks. Also a preempted sequence waits
    at its old place."""
    return seq.rank


def first_in_line(waiting: Seq[Sequence], served: Mapping[str, int]) -> Sequence:
    """Who enters next: of each tenant the first in order, and of these the one whose tenant was served least; of equals
    the first in order. Nobody starves: a tenant that is passed over is served no more, the others are."""
    if len(served) < 2:
        return waiting[0]
    heads: dict[str, Sequence] = {}
    for seq in waiting:
        heads.setdefault(seq.request.tenant, seq)
    return min(heads.values(), key=lambda seq: (served[seq.request.tenant], seq.rank))


class Shares:
    """Tokens computed for each tenant: the account of fairness (virtual token counters, Sheng et al., OSDI 2024).

    Who comes back starts at least at the smallest account of those present: absence earns no credit. When nobody is
    left all accounts are closed.
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        """Of the tenants that are present."""
        self._sequences: dict[str, int] = {}
        self._away: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """One more sequence of this tenant is present."""
        if tenant not in self.served:
            least = min(self.served.values(), default=0)
            self.served[tenant] = max(self._away.pop(tenant, 0), least)
        self._sequences[tenant] = self._sequences.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One less."""
        self._sequences[tenant] -= 1
        if not self._sequences[tenant]:
            del self._sequences[tenant]
            self._away[tenant] = self.served.pop(tenant)
        if not self._sequences:
            self._away.clear()

    def charge(self, tenant: str, num_tokens: int) -> None:
        self.served[tenant] += num_tokens


def victim(running: Seq[Sequence], needy: Sequence) -> Sequence | None:
    """Who gives up its blocks for `needy`: the last in order. None if that is `needy` itself: it waits.

    So the first in order is never preempted and can always have every block: somebody always gets ahead.
    """
    return running[-1] if running[-1] is not needy else None


class Policy(Protocol):
    """When sequences enter and leave the batch."""

    together: bool
    """Whether those who entered together leave together, and enter even if the step has no tokens left."""

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool, served: Mapping[str, int]) -> Iterator[Sequence]:
        """Those who may enter now, in order. Who is admitted is gone from `waiting` at the next `next()`;
        the first who does not fit ends the round: nobody overtakes. `served`: see `Shares`."""
        ...

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        """Whether those who are done may leave the batch now."""
        ...


class Continuous:
    """流水席, the running banquet: sit down on arrival, leave when done."""

    together = False

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool, served: Mapping[str, int]) -> Iterator[Sequence]:
        while waiting:
            yield first_in_line(waiting, served)

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        return True


class Static:
    """The classic banquet: a table sits down together and rises together. The baseline to measure against.

    While a group is at the table, only its own preempted members may come back to it.
    """

    together = True

    def entrants(self, waiting: Seq[Sequence], batch_empty: bool, served: Mapping[str, int]) -> Iterator[Sequence]:
        preempted = [seq for seq in waiting if seq.num_preemptions]
        yield from preempted
        while waiting and batch_empty and not preempted:
            yield waiting[0]

    def may_leave(self, waiting: Seq[Sequence], running: Seq[Sequence]) -> bool:
        return not running and not any(seq.num_preemptions for seq in waiting)


POLICIES: dict[str, Policy] = {"continuous": Continuous(), "static": Static()}
