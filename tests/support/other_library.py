"""A pytest plugin: the tests load the native library from another place (an instrumented build, say)."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native-library", metavar="FILE", type=Path, required=True)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the first conftest looks for implementations."""
    from liushui.kernels import native

    library = native.open_library(early_config.known_args_namespace.native_library)
    native._library = lambda: library
