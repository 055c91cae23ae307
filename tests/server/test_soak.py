"""A few seconds of `make soak`: everything at once, and nothing lost, leaked or changed."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")


def test_a_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None
    assert spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    code = soak.main(["--minutes", "0.05"])
    verdict = json.loads(capsys.readouterr().out)
    assert code == 0, verdict
    assert verdict["lost_duplicated_or_changed"] == []
    assert verdict["leaked"] == {}
    assert verdict["preemptions"] > 0
    assert verdict["reference_answers_compared"] > 0
