"""Who may join the queue. Bounded in requests and in tokens, decided at once, with a measured time to come back.

Counted is what is known to wait: it leaves the count when the loop has let it into the batch. Seats that are free do
not count as queue. A request that finds nobody waiting is always let in, however long (what can never fit was refused
before).
"""

from collections import deque

from liushui.config import ServingConfig
from liushui.errors import Overloaded

WINDOW = 30.0
"""Seconds over which rates are measured."""
SHORTEST, LONGEST = 1.0, 300.0
"""Seconds; bounds of what a refused request is told."""


class Rate:
    """Amount per second over the last `window` seconds."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, amount: int) -> None:
        self._seen.append((now, amount))
        self._sum += amount
        self._forget(now)

    def per_second(self, now: float) -> float:
        """0 until something was seen. Measured from the first that counts, over at least one second."""
        self._forget(now)
        if not self._seen:
            return 0.0
        return self._sum / max(now - self._seen[0][0], 1.0)

    def _forget(self, now: float) -> None:
        while self._seen and self._seen[0][0] < now - self._window:
            self._sum -= self._seen.popleft()[1]


class Queue:
    """The waiting, in numbers."""

    def __init__(self, serving: ServingConfig, seats: int) -> None:
        self._limits = serving
        self.seats = seats
        self.requests = 0
        self.tokens = 0
        self.seated = 0
        """Sequences in the batch."""
        self._entering = Rate()
        self._entering_tokens = Rate()

    def check(self, num_tokens: int, now: float) -> None:
        """Raises `Overloaded` if a request of so many prompt tokens would make the queue too long."""
        limits = self._limits
        if not self.requests:
            return
        if self.requests >= limits.max_queue_requests + max(self.seats - self.seated, 0):
            what = f"{self.requests:,} requests are waiting (max_queue_requests is {limits.max_queue_requests:,})"
            raise Overloaded("queue_requests", f"the server is busy: {what}", self.retry_after(now))
        if self.tokens + num_tokens > limits.max_queue_tokens:
            what = (
                f"{self.tokens:,} prompt tokens are waiting, {num_tokens:,} more are too many "
                f"(max_queue_tokens is {limits.max_queue_tokens:,})"
            )
            raise Overloaded("queue_tokens", f"the server is busy: {what}", self.retry_after(now))

    def join(self, num_tokens: int) -> None:
        self.requests += 1
        self.tokens += num_tokens

    def leave(self, num_tokens: int) -> None:
        """Out of the queue: into the batch, or ended before."""
        self.requests -= 1
        self.tokens -= num_tokens

    def entered(self, num_tokens: int, now: float) -> None:
        """Into the batch: what the rate is measured by."""
        self.leave(num_tokens)
        self._entering.add(now, 1)
        self._entering_tokens.add(now, num_tokens)

    def retry_after(self, now: float) -> float:
        """Seconds until half of those who wait will have entered, at the rate of the last half minute; the half in
        tokens if that takes longer. If nobody has entered in that time there is no rate: as long again."""
        if not self.requests:
            return SHORTEST
        rates = (self._entering.per_second(now), self._entering_tokens.per_second(now))
        if not all(rates):
            return WINDOW
        seconds = max(self.requests / 2 / rates[0], self.tokens / 2 / rates[1])
        return min(max(seconds, SHORTEST), LONGEST)
