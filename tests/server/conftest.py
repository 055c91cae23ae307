"""Servers for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.engine.scripted import ScriptedExecutor, saying
from tests.support.serving import Running, running, scripted, tiny_engine


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A tiny random Llama."""
    with running(tiny_engine()) as found:
        yield found


@pytest.fixture(scope="module")
def parrot() -> Iterator[Running]:
    """Says the same to everybody."""
    with running(scripted(ScriptedExecutor(model=saying("Hello, 你好 👋!")))) as found:
        yield found
