"""`import liushui` is instant, and what it promises is there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import liushui
from liushui.kernels.ops import load_native
from tests.cli.conftest import make_model


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


NOT_NEEDED = {"torch", "transformers", "huggingface_hub", "gguf", "safetensors", "fastapi", "uvicorn", "matplotlib"}
"""Slow to import, and of no use where a model answers on the processor by the native kernels."""


def modules_of(arguments: list[str], given: str = "") -> set[str]:
    """What a command has imported when it ends."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from liushui.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]], ids=" ".join)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_of(arguments)
    assert "liushui.cli.main" in loaded
    assert not loaded & {*NOT_NEEDED, "numpy", "tokenizers", "jinja2"}


@pytest.mark.parametrize(
    "flags", [[], ["--temperature", "0.8", "--top-k", "5", "--top-p", "0.9", "--seed", "1"]], ids=str
)
def test_answers_need_no_torch(tmp_path: Path, flags: list[str]) -> None:
    if load_native(1) is None:
        pytest.skip("the native library is not built")
    model = make_model(tmp_path / "model")
    loaded = modules_of(
        ["generate", "-", "--model", str(model), "--max-tokens", "3", "--device", "cpu", *flags], "Hi\n"
    )
    assert {"numpy", "tokenizers", "liushui.runner.runner"} <= loaded
    assert not loaded & NOT_NEEDED


def test_log_probabilities_bring_torch(tmp_path: Path) -> None:
    """The test above would see it."""
    model = make_model(tmp_path / "model")
    assert "torch" in modules_of(
        ["generate", "-", "--model", str(model), "--max-tokens", "1", "--logprobs", "1"], "Hi\n"
    )


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
