"""Fixtures of the engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import cores


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[cores.Steps]:
    """For `make_gated`, whose model is `tmp_path / "steps"`. Open in the end: nobody waits for ever."""
    held = cores.Steps(tmp_path / "steps")
    yield held
    held.open()
