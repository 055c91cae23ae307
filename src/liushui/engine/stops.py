"""Stop strings in a stream: nothing that may still become part of one is shown, and none is missed.

An Aho-Corasick automaton (Aho and Corasick, 1975) reads the text one character at a time, so the result cannot
depend on how the text was cut into tokens or chunks, and every character costs amortised O(1):

    state = the longest suffix of the text so far that begins some stop string
    depth = its length = exactly the characters that must be held back

Which stop wins: the one that is complete first. "ab" beats "abc", always. Of those that are complete at the same
character ("b" and "ab") the longest wins: it began first, and cuts the most.
"""

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The set of stop strings, shared by all sequences of a request. Immutable."""

    __slots__ = ("_depth", "_fail", "_match", "_next", "stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[int] = [-1]
        for number, stop in enumerate(self.stops):
            self._insert(number, stop)
        self._fail = [0] * len(self._next)
        self._link()

    def _insert(self, number: int, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].get(char)
            if child is None:
                child = self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(-1)
            node = child
        self._match[node] = number

    def _link(self) -> None:
        """Breadth first: the longest proper suffix of each node that is a node, and the longest stop ending there."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            if self._match[node] < 0:
                self._match[node] = self._match[self._fail[node]]
            for char, child in self._next[node].items():
                self._fail[child] = self.step(self._fail[node], char)
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def depth(self, state: int) -> int:
        """Characters of the text's end that may begin a stop string."""
        return self._depth[state]

    def match(self, state: int) -> str | None:
        """The longest stop string that the text ends with, if any."""
        number = self._match[state]
        return None if number < 0 else self.stops[number]


class StopScanner:
    """One sequence's text on its way out. After `matched` is set there is nothing more to feed."""

    __slots__ = ("_automaton", "_held", "_held_chars", "_include", "_state", "matched")

    def __init__(self, automaton: StopAutomaton, *, include: bool = False) -> None:
        """`include`: the stop string itself is shown; then nothing ever needs to be held back."""
        self._automaton = automaton
        self._include = include
        self._state = 0
        self._held: deque[str] = deque()
        self._held_chars = 0
        self.matched: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take more text; return what may be shown. While not `armed` (before min_tokens) a stop string that
        becomes complete is text like any other."""
        automaton, state = self._automaton, self._state
        for position, char in enumerate(text):
            state = automaton.step(state, char)
            if armed and (stop := automaton.match(state)) is not None:
                self.matched = stop
                self._state = 0
                return self._release(text[: position + 1], 0 if self._include else len(stop), drop=True)
        self._state = state
        return self._release(text, 0 if self._include else automaton.depth(state))

    def flush(self) -> str:
        """The text has ended: what was held back was not a stop string."""
        return self._release("", 0)

    def _release(self, text: str, keep: int, *, drop: bool = False) -> str:
        """Append `text` and take out all but the last `keep` characters; each is moved O(1) times."""
        if text:
            self._held.append(text)
            self._held_chars += len(text)
        count = self._held_chars - keep
        shown: list[str] = []
        while count > 0:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
                piece = piece[:count]
            shown.append(piece)
            count -= len(piece)
            self._held_chars -= len(piece)
        if drop:
            self._held.clear()
            self._held_chars = 0
        return "".join(shown)
