"""Where there is no C++ compiler the package installs and runs all the same, and says what it lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from liushui.kernels import native
from tests.support import tiny
from liushui.core.request import SamplingParams
assert str(native.__file__).startswith(sys.argv[1]), native.__file__
runner = tiny.runner(tiny.oracle("llama-tied"))
driver = tiny.Driver(runner)
driver.add("a", [5, 6, 7], SamplingParams(temperature=0))
print(len(driver.step({"a": 3}).tokens["a"]), "token")
print(*runner.notes, sep="\\n")
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


def test_it_runs_and_says_what_it_lost(built: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(built), str(ROOT)))}
    command = [sys.executable, "-c", RUN, str(built)]
    done = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 token" in done.stdout
    assert "native kernels: not built (no C++ compiler found): using plain torch" in done.stdout
