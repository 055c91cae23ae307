"""Whether an engine hangs: it is not dead, it owes an answer, and nothing comes.

    silent      no message has come                           for at most COMPUTING * patience
    still       and meanwhile the process did nothing         for at most patience

A step may be long for a good reason: the first long prompt on a slow machine, a kernel that is compiled, weights that
come from a slow disk. Then the process uses a processor or reads, and the operating system says so: that cannot be
claimed by a thread that lives on beside a loop that hangs. Where the system does not say (anything but Linux), only
silence counts.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from liushui.engine.messages import Orders, Told

COMPUTING = 10
"""A step that computes may take so many times the patience."""
SHARE = 0.02
"""Of a processor's time: who uses less does nothing but wait."""
LOOKS = 8
"""In the time of the patience."""


class Signs(NamedTuple):
    """What the system says of a process. All of them only grow."""

    cpu: float
    """Seconds of processor time, of all threads."""
    faults: int
    """Pages that had to be read from disk."""
    read: int
    """Bytes read from files and pipes."""


def signs(pid: int | None) -> Signs | None:
    """None: the system does not say, or there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # proc(5): fields 14 and 15 are the processor's time in ticks, 12 the major faults; the first here is the third
        cpu = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return Signs(cpu, int(stat[9]), _bytes_read(pid))
    except (OSError, ValueError, IndexError):
        return None


def _bytes_read(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except OSError:  # some kernels count no bytes, or tell nobody
        return 0


class Watch:
    """Keeps account of what a token loop owes, and loses patience."""

    def __init__(
        self,
        patience: float,
        look: Callable[[], Signs | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience`: seconds. `look`: signs of life of its process now."""
        self.period = patience / LOOKS
        """Seconds between two looks."""
        self._patience = patience
        self._look = look
        self._clock = clock
        self._owed = 0
        self._since = self._looked = clock()
        self._seen: Signs | None = None
        self._silent = self._still = 0.0

    # -- the account

    def starts(self) -> None:
        """A process was started: it owes its first message, and nothing else."""
        self._heard(1)
        self._seen = None

    def ready(self) -> None:
        """The first message is there."""
        self._heard(0)

    def sent(self, orders: Orders) -> None:
        """Every sequence that is handed over owes its end."""
        due = sum(request.sampling.n for request in orders.submit)
        if due and not self._owed:
            self._heard(0)
        self._owed += due

    def heard(self, told: Told) -> None:
        self._heard(max(self._owed - len(told.ended), 0))

    def _heard(self, owed: int) -> None:
        self._owed, self._since = owed, self._clock()
        self._silent = self._still = 0.0

    @property
    def quiet(self) -> float:
        """Seconds without a message, though one is owed; else 0."""
        return self._clock() - self._since if self._owed else 0.0

    # -- the patience

    def look(self) -> str:
        """To be called every `period` seconds. Why it is taken to hang; "" if it is not.

        Only time in which this process looked counts: if it was stopped itself, it blames nobody for that."""
        now, found = self._clock(), self._look()
        seconds = min(now - self._looked, 2 * self.period)
        busy = found is None or self._seen is None or _busy(self._seen, found, seconds)
        self._looked, self._seen = now, found
        if not self._owed:
            return ""
        self._silent += seconds
        self._still = 0.0 if busy else self._still + seconds
        if self._still > self._patience:
            return f"nothing came from it and it did nothing for {self._still:.0f} s"
        if self._silent > COMPUTING * self._patience:
            return f"nothing came from it for {self._silent:.0f} s"
        return ""


def _busy(before: Signs, now: Signs, seconds: float) -> bool:
    return now.cpu - before.cpu >= SHARE * seconds or now[1:] != before[1:]
