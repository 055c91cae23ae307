"""Where there is no C++ compiler the package installs and runs all the same, and says what it lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import make_model

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from liushui import LLM, SamplingParams
from liushui.kernels import native
assert str(native.__file__).startswith(sys.argv[1]), native.__file__
llm = LLM(sys.argv[2], kv_cache_gib=0.01, threads=1)
answer = llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)[0]
print(len(answer.outputs[0].token_ids), "token")
print(*llm.engine.executor.notes, sep="\\n")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` would put in place, made where no compiler can be found."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("_cpu.*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    nowhere = folder / "bin"
    nowhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")} | {"PATH": str(nowhere)}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native kernels not built: no C++ compiler found" in done.stderr
    return folder / "built"


def test_it_says_why_there_is_no_library(built: Path) -> None:
    kernels = built / "liushui" / "kernels"
    assert (kernels / "_cpu.reason").read_text(encoding="utf-8") == "no C++ compiler found\n"
    assert not list(kernels.glob("_cpu.so"))
    assert not list(kernels.glob("_cpu.dylib"))


def test_it_runs_and_says_what_it_lost(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(built), str(make_model(tmp_path / "model"))]
    environment = os.environ | {"PYTHONPATH": str(built)}
    done = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 token" in done.stdout
    assert "native kernels: not built (no C++ compiler found): using plain torch" in done.stdout
