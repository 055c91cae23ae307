"""What a step costs in seconds, learned from the steps themselves, and how much of a prompt fits into one.

A step's time is taken to be linear in four numbers (`Work`):

    seconds = base + per_decode * decodes + per_token * prompt_tokens + per_pair * pairs

`base` is reading the weights once; a decoded row and a row of a prompt cost differently (other kernels, other reuse);
`pairs` counts each fed token's keys. Fitted by least squares of the relative error, in which older steps count less and
less. No clock here: measured seconds come in by argument.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

from liushui.core.plan import StepPlan

_FORGET = 0.98
"""Weight of a step's observation when the next one of its kind (with prompts, without) comes: about 50 of each count,
and what a prompt costs is not forgotten in a long time without."""
_RIDGE = 1e-6
"""Pulls what was never observed towards 0; relative to the weight of all observations."""
_SCALE = (1.0, 8.0, 64.0, 65536.0)
"""Typical sizes of the four numbers: the sums stay well conditioned."""
FACTOR = 2.0
"""A step with prompts may take at most this many times the step without, if no target was given in milliseconds: half
of the time is for those who decode."""
LIMIT = 2.8
"""And less where steps take longer than predicted now and then: the slowest of them too are to stay within this many
times the middle step without (3 is what is promised)."""
LEAST = 1.5
"""But not less than this many times: prompts keep half of what they would have on a machine that is steady."""
_WINDOW = 256
"""Steps of each kind of which it is remembered how much longer than predicted they took."""
_SLOWEST = 0.99
"""Quantile of these that stands for the slowest: of a whole window the third."""
_FEW = 8
"""Steps of a kind from which on a prediction is one."""
FLOOR = 4
"""Tokens of the first prompt that every step takes in, however late: it must not starve either. Few: on a processor
each costs about what a decode does."""
START = 16
"""The longest chunk while none was measured."""
_UNBOUNDED = 1 << 31
GROWTH = 2
"""A chunk may be this many times the longest one measured: what is linear near by may not be far off."""


class Work(NamedTuple):
    """What a step computes."""

    decodes: int = 0
    """Sequences fed one token."""
    prompt_tokens: int = 0
    """Tokens fed of all others."""
    pairs: int = 0
    """Query-key pairs: of each fed token, its position + 1."""

    def plus(self, start: int, num_tokens: int) -> "Work":
        """And `num_tokens` of a sequence from position `start`."""
        pairs = num_tokens * (2 * start + num_tokens + 1) // 2
        if num_tokens == 1:
            return Work(self.decodes + 1, self.prompt_tokens, self.pairs + pairs)
        return Work(self.decodes, self.prompt_tokens + num_tokens, self.pairs + pairs)

    @classmethod
    def of(cls, plan: StepPlan, longest: int | None = None) -> "Work":
        """Of the sequences that are fed at most `longest` tokens; None: of all."""
        work = cls()
        for item in plan.items:
            if longest is None or item.num_tokens <= longest:
                work = work.plus(item.start, item.num_tokens)
        return work


class _Sums:
    """Sums of products, each observation weighing less with every later one."""

    __slots__ = ("count", "products", "squares")

    def __init__(self) -> None:
        self.count = 0
        self.squares = [[0.0] * 4 for _ in range(4)]
        self.products = [0.0] * 4

    def add(self, row: list[float], value: float) -> None:
        self.count += 1
        for i in range(4):
            self.squares[i] = [old * _FORGET + row[i] * x for old, x in zip(self.squares[i], row, strict=True)]
            self.products[i] = self.products[i] * _FORGET + row[i] * value


class StepCost:
    """The fit. `coefficients` are seconds per (step, decode, prompt token, pair), none below 0."""

    def __init__(self) -> None:
        self._kinds = (_Sums(), _Sums())  # steps without prompts, and with
        self._fitted: tuple[float, ...] | None = None

    def observe(self, work: Work, seconds: float) -> None:
        """Learn that a step with this work took so long; what took no time teaches nothing."""
        if seconds > 0:
            row = [x / scale / seconds for x, scale in zip((1, *work), _SCALE, strict=True)]
            self._kinds[work.prompt_tokens > 0].add(row, 1.0)
            self._fitted = None

    def knows(self, work: Work) -> bool:
        """Whether steps of its kind were seen often enough to predict one."""
        return self._kinds[work.prompt_tokens > 0].count >= _FEW

    @property
    def coefficients(self) -> tuple[float, ...]:
        if self._fitted is None:
            self._fitted = tuple(x / scale for x, scale in zip(self._solve(), _SCALE, strict=True))
        return self._fitted

    def seconds(self, work: Work) -> float:
        return sum(c * x for c, x in zip(self.coefficients, (1, *work), strict=True))

    def _solve(self) -> list[float]:
        """Least squares with none below 0: the most negative one is fixed at 0 until there is none."""
        one, other = self._kinds
        squares = [[one.squares[i][j] + other.squares[i][j] for j in range(4)] for i in range(4)]
        products = [one.products[i] + other.products[i] for i in range(4)]
        ridge = _RIDGE * sum(squares[i][i] for i in range(4)) + 1e-30
        free = [0, 1, 2, 3]
        while True:
            matrix = [[squares[i][j] + ridge * (i == j) for j in free] for i in free]
            found = solve(matrix, [products[i] for i in free])
            if not found or min(found) >= 0:
                break
            del free[found.index(min(found))]
        values = dict(zip(free, found, strict=True))
        return [values.get(i, 0.0) for i in range(4)]


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of `matrix` x = `right`, for a positive definite matrix (Gauss, without exchanges)."""
    a = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(a)
    for i in range(size):
        for k in range(i + 1, size):
            ratio = a[k][i] / a[i][i]
            for j in range(i, size + 1):
                a[k][j] -= ratio * a[i][j]
    x = [0.0] * size
    for i in reversed(range(size)):
        x[i] = (a[i][size] - sum(a[i][j] * x[j] for j in range(i + 1, size))) / a[i][i]
    return x


class _Window:
    """The last values, in order of size."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        self._values.append(value)
        insort(self._sorted, value)
        if len(self._values) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]

    def quantile(self, share: float, none: float) -> float:
        """`none`: if there is no value."""
        return self._sorted[int(share * len(self._sorted))] if self._sorted else none


class Noise:
    """How far steps stray from what was predicted: other processes, caches, what is not linear.

    What a slow step takes too long is counted in steps without prompts, whether it had prompts or not: an interruption
    lasts as long in a short step as in a long one. Where whole stretches are slower instead, a step with prompts takes
    the longer the more it is given, and what it is given settles where the two agree."""

    def __init__(self) -> None:
        self._calm = _Window()
        """Steps without prompts: how many times the predicted seconds they took."""
        self._longer = (_Window(), _Window())
        """Steps without prompts, and with: what they took longer, in predicted steps without."""

    def add(self, beside: float, predicted: float, seconds: float, prompts: bool) -> None:
        """A step took `seconds`. `beside`: predicted of it without its prompts."""
        self._longer[prompts].add((seconds - predicted) / beside)
        if not prompts:
            self._calm.add(seconds / predicted)

    @property
    def factor(self) -> float:
        """How many times the step without prompts one with them may be predicted to take."""
        longer = max(window.quantile(_SLOWEST, 0.0) for window in self._longer)
        return min(max(LIMIT * self._calm.quantile(0.5, 1.0) - longer, LEAST), FACTOR)


class Pace(NamedTuple):
    """How far one step may go, in time. Holds only while somebody decodes in it: alone, nobody is kept waiting."""

    coefficients: tuple[float, ...]
    target: float | None
    """Seconds; None: `factor` times the step without prompts."""
    longest: int
    """Prompt tokens in one step that experience covers."""
    factor: float = FACTOR

    def chunk(self, decoding: Work, work: Work, start: int) -> int:
        """How many tokens of a prompt, from position `start`, fit into the step beside `work`.

        `decoding`: the part of the work that is not up for choice. What was never measured grows from `START`."""
        if not decoding.decodes:
            return _UNBOUNDED
        _, _, per_token, per_pair = self.coefficients
        alone = self._seconds(decoding)
        left = (self.factor * alone if self.target is None else self.target) - self._seconds(work)
        fits = min(_tokens_within(left, per_token, per_pair, start), self.longest - work.prompt_tokens)
        return max(fits, 0 if work.prompt_tokens else FLOOR)

    def _seconds(self, work: Work) -> float:
        return sum(c * x for c, x in zip(self.coefficients, (1, *work), strict=True))


def _tokens_within(seconds: float, per_token: float, per_pair: float, start: int) -> int:
    """The largest t with per_token * t + per_pair * (start * t + t * t / 2) <= seconds."""
    if seconds <= 0:
        return 0
    linear, square = per_token + per_pair * start, per_pair / 2
    # The stable form of the quadratic formula: the usual one loses all digits when `square` is small.
    divisor = linear + (linear * linear + 4 * square * seconds) ** 0.5
    return int(min(2 * seconds / divisor, _UNBOUNDED)) if divisor > 0 else _UNBOUNDED


class Pacer:
    """Learns from each step; says how far the next may go."""

    def __init__(self, target: float | None = None) -> None:
        """`target`: seconds of the longest step while others decode. None: in proportion to the step without."""
        self.target = target
        self.cost = StepCost()
        self.noise = Noise()
        self._longest = START

    def observe(self, plan: StepPlan, seconds: float) -> None:
        self.learn(Work.of(plan, longest=1), Work.of(plan), seconds)

    def learn(self, beside: Work, work: Work, seconds: float) -> None:
        """A step with this work took so long. `beside`: of it, that of sequences with one token."""
        alone = self.cost.seconds(beside)
        if beside.decodes and alone > 0 and seconds > 0 and self.cost.knows(work):
            self.noise.add(alone, self.cost.seconds(work), seconds, work.prompt_tokens > 0)
        self.cost.observe(work, seconds)
        self._longest = max(self._longest, GROWTH * work.prompt_tokens)

    def pace(self) -> Pace:
        return Pace(self.cost.coefficients, self.target, self._longest, self.noise.factor)
