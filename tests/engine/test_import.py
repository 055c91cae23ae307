"""`import liushui` is instant, and what it promises is there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import liushui


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_brings_nothing_heavy() -> None:
    loaded = modules_after("import liushui")
    assert not loaded & {"torch", "numpy", "tokenizers", "rich", "jinja2", "huggingface_hub", "transformers"}
    assert {name for name in loaded if name.startswith("liushui")} == {"liushui"}


def test_parameters_need_no_torch() -> None:
    loaded = modules_after("from liushui import SamplingParams, EngineConfig, RequestOutput, ParameterError")
    assert not loaded & {"torch", "numpy", "tokenizers", "rich"}


def test_the_llm_class_itself_needs_no_torch() -> None:
    """Refusing a wrong setting must not wait for it."""
    assert not modules_after("from liushui import LLM") & {"torch", "numpy", "rich", "transformers"}


@pytest.mark.parametrize("name", liushui.__all__)
def test_everything_promised_is_there(name: str) -> None:
    assert getattr(liushui, name).__name__ == name
    assert name in dir(liushui)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        _ = liushui.LLMs  # type: ignore[attr-defined]


def test_version_is_the_packages() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert liushui.__version__ == tomllib.loads(project.read_text())["project"]["version"]
