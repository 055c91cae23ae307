"""Servers for the tests of this folder. Without FastAPI or httpx there is nothing to test."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("fastapi") and find_spec("httpx") else ["test_*.py"]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A tiny random Llama."""
    from tests.support.serving import running, tiny_engine

    with running(tiny_engine()) as found:
        yield found


@pytest.fixture(scope="module")
def parrot() -> Iterator[Any]:
    """Says the same to everybody."""
    from tests.engine.scripted import ScriptedExecutor, saying
    from tests.support.serving import running, scripted

    with running(scripted(ScriptedExecutor(model=saying("Hello, 你好 👋!")))) as found:
        yield found
