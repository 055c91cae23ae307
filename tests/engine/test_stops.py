"""Stop strings: hold-back, earliest match, independence of chunking."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.engine.stops import StopAutomaton, StopScanner

alphabet = "ab你 "
texts = st.text(alphabet, max_size=40)
stop_sets = st.lists(st.text(alphabet, min_size=1, max_size=5), min_size=1, max_size=5, unique=True)


def cut(text: str, data: st.DataObject) -> list[str]:
    points = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *points], [*points, len(text)], strict=True)]


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, by brute force: the first end position at which any stop string is complete; longest there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(chunks: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    scanner = StopScanner(StopAutomaton(stops), include=include)
    shown = []
    for chunk in chunks:
        shown.append(scanner.feed(chunk))
        if scanner.matched is not None:
            return shown, scanner.matched
    return [*shown, scanner.flush()], None


@given(texts, stop_sets, st.booleans(), st.data())
@settings(max_examples=500, deadline=None)
def test_any_chunking_gives_the_definition(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    shown, matched = run(cut(text, data), stops, include)
    assert ("".join(shown), matched) == reference(text, stops, include)


@given(texts, stop_sets)
@settings(max_examples=300, deadline=None)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    """Character by character, exactly the longest suffix that begins a stop string is withheld."""
    scanner, shown = StopScanner(StopAutomaton(stops)), ""
    for position, char in enumerate(text):
        shown += scanner.feed(char)
        if scanner.matched is not None:
            return
        seen = text[: position + 1]
        held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert shown == seen[: len(seen) - held]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "matched"),
    [
        ("xxabcxx", ["ab", "abc"], "xx", "ab"),  # the shorter is complete first
        ("xxabcxx", ["abc", "ab"], "xx", "ab"),  # whatever the order
        ("xxab", ["b", "ab"], "xx", "ab"),  # complete together: the longest
        ("xabab", ["abab"], "x", "abab"),  # at the very end
        ("aaab", ["aab"], "a", "aab"),  # the match begins inside an earlier attempt
        ("ababac", ["abac"], "ab", "abac"),
        ("abx", ["abc", "bx"], "a", "bx"),  # a failed attempt hides another
        ("no", ["nothing"], "no", None),  # held back, then released
        ("", ["a"], "", None),
        ("a.b", ["."], "a", "."),  # not a pattern
    ],
)
def test_examples(text: str, stops: list[str], shown: str, matched: str | None) -> None:
    for chunks in ([text], list(text)):
        pieces, found = run(chunks, stops, include=False)
        assert ("".join(pieces), found) == (shown, matched)


def test_include_holds_nothing_back() -> None:
    scanner = StopScanner(StopAutomaton(["<end>"]), include=True)
    assert scanner.feed("a<en") == "a<en"
    assert scanner.feed("d>b") == "d>"
    assert scanner.matched == "<end>"


def test_unarmed_matches_are_text() -> None:
    """Before min_tokens a complete stop string is passed on, and one begun there can still be completed later."""
    scanner = StopScanner(StopAutomaton(["ab"]))
    assert scanner.feed("xabya", armed=False) == "xaby"
    assert scanner.matched is None
    assert scanner.feed("b!") == ""
    assert scanner.matched == "ab"


def test_long_stop_string_costs_no_rescans() -> None:
    """The automaton steps at most twice per character, however long the stop string."""

    class Counting(StopAutomaton):
        __slots__ = ()
        looked = 0

        def step(self, state: int, char: str) -> int:
            Counting.looked += 1
            return super().step(state, char)

    automaton = Counting(["a" * 2000 + "b"])
    Counting.looked = 0
    scanner = StopScanner(automaton)
    shown = "".join(scanner.feed("a") for _ in range(6000)) + scanner.flush()
    assert shown == "a" * 6000
    assert Counting.looked == 6000
