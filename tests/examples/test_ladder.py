"""The ladder: every rung gives the tokens of the one before it, and wastes what it says it wastes."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from tests.cli.conftest import make_model

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNGS = sorted(path.stem for path in EXAMPLES.glob("0*.py"))


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path[:] = [entry for entry in sys.path if entry != str(EXAMPLES)]


def climb_all(model: Path) -> dict[str, Any]:
    """Meters of all rungs, after checking that their answers are the same."""
    ladder = import_module("ladder")
    house = ladder.load(str(model))
    meters, answers = {}, {}
    for rung in RUNGS:
        meters[rung] = ladder.Meter()
        answers[rung] = import_module(rung).generate(house, house.requests, meters[rung])
    assert [len(answer) for answer in answers[RUNGS[0]]] == [wanted for _, wanted in house.requests]
    for rung in RUNGS:
        assert answers[rung] == answers[RUNGS[0]], rung
        assert sorted(meters[rung].first) == list(range(len(house.requests)))
        assert meters[rung].tokens == sum(wanted for _, wanted in house.requests)
    needed = sum(len(ids) + wanted - 1 for ids, wanted in house.requests)
    rows = {rung: meter.rows for rung, meter in meters.items()}
    assert rows["02_kv_cache"] == rows["06_continuous_batching"] == needed
    assert rows["03_padded_batch"] > rows["05_static_batching"] > needed
    assert rows["01_one_sequence"] > 2 * needed
    return meters


def test_there_are_six_short_rungs() -> None:
    assert len(RUNGS) == 6
    for rung in RUNGS:
        assert len((EXAMPLES / f"{rung}.py").read_text().splitlines()) < 80


def test_all_rungs_on_a_tiny_model(tmp_path: Path) -> None:
    climb_all(make_model(tmp_path / "tiny"))


def test_a_rung_as_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["04_truncation.py", str(make_model(tmp_path / "tiny"))])
    import_module("04_truncation").main()
    said = capsys.readouterr().out
    assert "same tokens as 03_padded_batch: checked" in said
    assert "prompt tokens are cut off on the left" in said
    assert "same tokens as each shortened prompt alone: checked" in said
    assert "tokens/s" in said


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_is_a_program(
    rung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints what it measured, and that its tokens are those of the rung before it."""
    monkeypatch.setattr(sys, "argv", [f"{rung}.py", str(make_model(tmp_path / "tiny"))])
    run_path(str(EXAMPLES / f"{rung}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for measured in ("tokens/s", "first token after", "wasted"):
        assert measured in said
    before = RUNGS.index(rung) - 1
    assert (f"same tokens as {RUNGS[before]}: checked" in said) == (before >= 0)


def test_a_rung_that_chooses_otherwise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["02_kv_cache.py", str(make_model(tmp_path / "tiny"))])
    wrong = import_module("02_kv_cache")
    honest = wrong.generate
    monkeypatch.setattr(wrong, "generate", lambda *args: [[0, *answer[1:]] for answer in honest(*args)])
    with pytest.raises(AssertionError, match="02_kv_cache chose other tokens than 01_one_sequence"):
        import_module("ladder").climb("02_kv_cache", "01_one_sequence")


@pytest.mark.real_model
def test_all_rungs_on_the_default_model(smollm2: Path) -> None:
    meters = climb_all(smollm2)
    assert len(meters) == 6
